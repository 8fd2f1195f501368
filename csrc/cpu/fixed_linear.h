// y = x W^T + bias, a row of which has the same bits whatever rows are computed beside it (lanes.h).
#pragma once

#include <algorithm>

#include "lanes.h"

namespace longgrpo {

template <class T>
struct LinearArguments {
  const T* x;  // [rows, inner], rows at x_stride
  int64_t x_stride, rows, inner;
  const T* weight;  // [outer, inner], rows at weight_stride
  int64_t weight_stride, outer;
  const T* bias;  // [outer] or null
  T* y;           // [rows, outer]

  int64_t panels() const { return (rows + lanes::kLanes - 1) / lanes::kLanes; }
  int64_t panel_size() const { return inner * lanes::kLanes; }
};

namespace linear_tiles {

constexpr int64_t kTileOuter = 32;         // of the weight's rows in one product
constexpr int64_t kCachedBytes = 1 << 19;  // of the weight, which a thread reads again for each panel

inline void product(const float* a, int64_t stride, int64_t rows, int64_t k, const float* panel, int64_t lanes,
                    float* c) {
  lanes::product(a, stride, 1, rows, k, panel, lanes, c, false);
}
inline void product(const lanes::Bf16* a, int64_t stride, int64_t rows, int64_t k, const lanes::Bf16* panel,
                    int64_t lanes, float* c) {
  lanes::product(a, stride, rows, k, panel, lanes, c, false);
}

// The weight's rows [begin, end) for the panels [first, last).
template <class T>
void part(const LinearArguments<T>& in, const T* panels, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const lanes::TileState state;
  alignas(64) float c[kTileOuter * lanes::kLanes];
  const int64_t row_bytes = in.inner * int64_t(sizeof(T));
  const int64_t chunk = std::max<int64_t>(1, kCachedBytes / row_bytes / kTileOuter) * kTileOuter;
  for (int64_t j = begin; j < end; j += chunk) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t row = p * lanes::kLanes, lanes = std::min(lanes::kLanes, in.rows - row);
      for (int64_t n = j; n < std::min(end, j + chunk); n += kTileOuter) {
        const int64_t rows = std::min(kTileOuter, end - n);
        product(in.weight + n * in.weight_stride, in.weight_stride, rows, in.inner, panels + p * in.panel_size(), lanes,
                c);
        T* y[lanes::kLanes];
        for (int64_t i = 0; i < lanes; ++i) y[i] = in.y + (row + i) * in.outer + n;
        lanes::store(c, rows, lanes, y, in.bias ? in.bias + n : nullptr);
      }
    }
  }
}

}  // namespace linear_tiles

// `panels`: memory for panels() * panel_size() numbers, in whole cache lines.
template <class T, class Runtime>
void run_linear(const Runtime& runtime, const LinearArguments<T>& in, T* panels) {
  runtime.parallel_for(in.panels(), [&](int64_t p) {
    const T* rows[lanes::kLanes];
    const int64_t begin = p * lanes::kLanes, count = std::min(lanes::kLanes, in.rows - begin);
    for (int64_t i = 0; i < count; ++i) rows[i] = in.x + (begin + i) * in.x_stride;
    lanes::pack(rows, count, in.inner, panels + p * in.panel_size());
  });
  const int64_t threads = runtime.threads(),
                tiles = (in.outer + linear_tiles::kTileOuter - 1) / linear_tiles::kTileOuter;
  const bool by_outer = tiles >= 2 * threads || in.panels() < threads;
  const int64_t parts = std::min(threads, by_outer ? tiles : in.panels());
  runtime.parallel_for(parts, [&](int64_t i) {
    const auto cut = [&](int64_t n, int64_t at) { return n * at / parts; };
    if (!by_outer) return linear_tiles::part(in, panels, cut(in.panels(), i), cut(in.panels(), i + 1), 0, in.outer);
    const auto outer = [&](int64_t at) { return std::min(in.outer, cut(tiles, at) * linear_tiles::kTileOuter); };
    linear_tiles::part(in, panels, 0, in.panels(), outer(i), outer(i + 1));
  });
}

}  // namespace longgrpo
