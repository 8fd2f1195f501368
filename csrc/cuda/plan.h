// How a pass of the head is cut into tiles on CUDA, and the workspace of each: chosen by a model of waves.
//
// A library GEMM computes its output in tiles of 128 x 256, one for each multiprocessor at a time. 176 tiles on 132
// multiprocessors are two waves, the second of which is two thirds empty. So rows and columns are those with the least
// sum of the GEMMs' waves, the bytes that all kernels read and write, and the launches. The rates are an H100's by
// arithmetic; only their proportions matter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../head/head_pass.h"
#include "launch.h"

namespace longgrpo {

// What a pass wants, as far as memory and tiling are concerned.
struct CudaWish {
  HeadShape shape;
  Dtype hidden_dtype, weight_dtype;
  bool reference, hidden_gradient, weight_gradient;
  bool beyond_logp;  // a gradient of the entropy or of the exact KL

  // Operands of one dtype go to the GEMM as they are; a mixture is upcast.
  bool mixed() const { return hidden_dtype != weight_dtype; }
  Dtype gemm_dtype() const { return mixed() ? Dtype::f32 : hidden_dtype; }
  // Whether the vocabulary may come in chunks: the gradient needs no more of a row than its logp.
  bool can_chunk() const { return !reference && !beyond_logp; }
};

enum class Tiling {
  whole_rows,  // head_pass.h
  chunks,      // flash_pass.h
  weight       // only the weight's gradient: chunks of the vocabulary outside, tiles of rows inside
};

struct CudaPlan {
  Tiling tiling;
  int64_t tile_rows;
  int64_t chunk;   // vocabulary columns at a time; all of them in whole rows
  int64_t stride;  // of a row of logits
  int64_t bytes;   // of workspace
};

constexpr int64_t kUpcastRows = 4096;                   // rows of a mixed head's weight that are upcast at once
constexpr int64_t kGradientRows = 2048;                 // rows of dW whose fp32 product stays in L2 until it is added
constexpr int64_t kGemmRows = 128, kGemmColumns = 256;  // output tile of a library GEMM at full rate
constexpr int64_t kAlignment = 256;

inline int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t logits_columns(const HeadShape& shape) {
  return ceil_divide(shape.vocabulary, kStrideUnit) * kStrideUnit;
}

// Segments of a whole row in chunks of so many columns.
inline int64_t segments_of(int64_t vocabulary, int64_t columns) {
  return vocabulary / columns * ceil_divide(columns, kSegment) + ceil_divide(vocabulary % columns, kSegment);
}

// Bytes of workspace of tiles of so many rows and columns.
inline int64_t tile_bytes(const CudaWish& wish, Tiling tiling, int64_t rows, int64_t columns) {
  const auto [n, h, v] = wish.shape;
  constexpr int64_t kParts = 12;  // each is aligned
  const int64_t upcast = wish.mixed() ? std::min(v, kUpcastRows) : 0, hidden_tile = wish.mixed() ? h : 0;
  const int64_t fixed = kParts * kAlignment + 4 + 4 * h * upcast;
  if (tiling == Tiling::chunks)
    return fixed + rows * (4 * (columns + hidden_tile + (wish.hidden_gradient ? h : 0)) + int64_t(sizeof(ChunkState)) +
                           kPartBytes * segments_of(v, columns));
  if (tiling == Tiling::weight) return fixed + 4 * (rows * (columns + hidden_tile) + columns * h + n);
  const int64_t references = wish.reference ? 1 : 0;
  const bool hidden = wish.mixed() || wish.weight_gradient;  // upcast, or scaled for the weight's gradient
  const int64_t per_row = columns * (1 + references) +
                          h * ((hidden ? 1 : 0) + (wish.mixed() ? references : 0) + (wish.hidden_gradient ? 1 : 0)) + 2;
  return fixed + 4 * (rows * per_row + (wish.weight_gradient ? h * std::min(v, kGradientRows) : 0));
}

// ---- the model, in nanoseconds ----

struct WaveModel {
  static constexpr double kMultiplyAdds = 2700, kBytes = 20;  // of a multiprocessor in a nanosecond
  static constexpr double kLaunch = 2000;

  double multiprocessors;

  double gemm(int64_t m, int64_t n, int64_t k) const {
    const double tiles = double(ceil_divide(m, kGemmRows)) * double(ceil_divide(n, kGemmColumns));
    const double waves = double(int64_t((tiles + multiprocessors - 1) / multiprocessors));
    return waves * kGemmRows * kGemmColumns * double(k) / kMultiplyAdds;
  }
  double memory(double bytes) const { return bytes / (kBytes * multiprocessors); }

  // One tile of rows and one of columns.
  double tile(const CudaWish& wish, Tiling tiling, int64_t rows, int64_t columns) const {
    const int64_t h = wish.shape.hidden;
    const double e = double(size_of(wish.gemm_dtype())), r = double(rows), c = double(columns), k = double(h);
    const double logits = r * k * e + c * k * e + 4 * r * c, rewritten = (4 + e) * r * c;
    const double first = gemm(rows, columns, h);
    if (tiling == Tiling::weight)
      return first + gemm(columns, h, rows) + memory(logits + rewritten + e * r * c + e * r * k + 8 * c * k) +
             3 * kLaunch;
    const double back =
        first + gemm(rows, h, columns) + memory(logits + rewritten + e * r * c + e * c * k + 8 * r * k) + 3 * kLaunch;
    if (tiling == Tiling::chunks || !wish.weight_gradient) return back;
    const int64_t pieces = ceil_divide(columns, kGradientRows);
    return back + double(pieces) * gemm(std::min(columns, kGradientRows), h, rows) +
           memory(e * r * c + double(pieces) * e * r * k + 8 * c * k) + double(2 * pieces) * kLaunch;
  }

  double pass(const CudaWish& wish, Tiling tiling, int64_t rows, int64_t columns) const {
    const auto [n, h, v] = wish.shape;
    const int64_t whole_rows = n / rows, whole_columns = v / columns, last_row = n % rows, last_column = v % columns;
    double time = double(whole_rows * whole_columns) * tile(wish, tiling, rows, columns);
    if (last_row) time += double(whole_columns) * tile(wish, tiling, last_row, columns);
    if (last_column) time += double(whole_rows) * tile(wish, tiling, rows, last_column);
    if (last_row && last_column) time += tile(wish, tiling, last_row, last_column);
    return time;
  }
};

inline CudaPlan plan_of(const CudaWish& wish, Tiling tiling, int64_t rows, int64_t columns) {
  const int64_t stride = tiling == Tiling::whole_rows ? logits_columns(wish.shape) : columns;
  return {tiling, rows, columns, stride, tile_bytes(wish, tiling, rows, columns)};
}

// ---- the choice ----

// The tiles that the limit allows, the best number of columns for each number of rows, those of the least time first.
// Scoring and a frozen head's gradient take the same ones, both as if there were a gradient, and calls of more than
// kTokens tokens those of kTokens: so the library's GEMM rounds their logits alike.
inline std::vector<CudaPlan> candidate_tiles(const CudaWish& asked, Tiling tiling, int64_t limit_bytes,
                                             const Chip& chip) {
  CudaWish wish = asked;
  if (tiling == Tiling::chunks) wish.hidden_gradient = true, wish.weight_gradient = false;
  const auto [n, h, v] = wish.shape;
  const int64_t all = logits_columns(wish.shape), unit = std::min<int64_t>(all, kSegment);
  const int64_t least = tiling == Tiling::whole_rows ? all : unit;
  check_workspace(limit_bytes, tile_bytes(wish, tiling, kMinTileRows, least));
  const WaveModel model{double(chip.multiprocessors)};
  constexpr int64_t kTokens = 8192, kTries = 12;
  CudaWish timed = wish;
  timed.shape.tokens = std::min(n, kTokens);

  struct Candidate {
    double time;
    int64_t rows, columns;
  };
  std::vector<Candidate> found;
  // -> whether any columns fit
  const auto consider_rows = [&](int64_t rows) {
    if (tile_bytes(wish, tiling, rows, least) > limit_bytes) return false;
    Candidate best{};
    const auto consider = [&](int64_t columns) {
      const double time = model.pass(timed, tiling, rows, std::min(columns, v));
      if (best.rows == 0 || time < best.time) best = {time, rows, columns};
    };
    if (tile_bytes(wish, tiling, rows, all) <= limit_bytes) consider(all);
    if (least < all) {
      const int64_t one = tile_bytes(wish, tiling, rows, kSegment), two = tile_bytes(wish, tiling, rows, 2 * kSegment);
      const int64_t fit = kSegment + (limit_bytes - one) / ((two - one) / kSegment);
      const int64_t most = std::min(all, fit / kSegment * kSegment), fewest = ceil_divide(v, most);
      for (int64_t chunks = fewest; chunks < fewest + kTries; ++chunks)
        consider(std::min(most, ceil_divide(ceil_divide(v, chunks), kSegment) * kSegment));
    }
    found.push_back(best);
    return true;
  };
  const int64_t rows = std::max(timed.shape.tokens, kMinTileRows);
  for (int64_t r = kGemmRows; r < rows; r += kGemmRows)
    if (!consider_rows(r)) break;
  consider_rows(rows);
  if (found.empty() || rows < kGemmRows)  // less than one GEMM tile of rows
    for (int64_t r = kMinTileRows; r < std::min(rows, kGemmRows) || found.empty(); r *= 2)
      if (!consider_rows(r)) break;
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.time < b.time; });
  std::vector<CudaPlan> plans;
  for (const auto& c : found) plans.push_back(plan_of(asked, tiling, c.rows, c.columns));
  return plans;
}

inline CudaPlan best_tiles(const CudaWish& wish, Tiling tiling, int64_t limit_bytes, const Chip& chip) {
  return candidate_tiles(wish, tiling, limit_bytes, chip).front();
}

inline Tiling tiling_of(const CudaWish& wish) {
  return wish.can_chunk() && !wish.weight_gradient ? Tiling::chunks : Tiling::whole_rows;
}

// Tiles of one pass over every output that is wanted.
inline CudaPlan plan_cuda(const CudaWish& wish, int64_t limit_bytes, const Chip& chip) {
  return best_tiles(wish, tiling_of(wish), limit_bytes, chip);
}

// The same in two passes: chunks for all but the weight's gradient, and one for that.
inline CudaWish without_weight(CudaWish wish) {
  wish.weight_gradient = false;
  return wish;
}
inline CudaPlan plan_weight(const CudaWish& wish, int64_t limit_bytes, const Chip& chip) {
  return best_tiles(wish, Tiling::weight, limit_bytes, chip);
}

// Whether a trained head takes two passes, 4 GEMMs, or one over whole rows, 3 GEMMs if c is known in the row: a
// small workspace has too few whole rows, and dW is read and written for each tile of them. plan(wish, tiling): tiles.
template <class Plan>
bool splits(const CudaWish& wish, int64_t limit_bytes, const Chip& chip, bool c_in_row, const Plan& plan) {
  if (!wish.weight_gradient || !wish.can_chunk()) return false;
  const int64_t all = logits_columns(wish.shape);
  if (!c_in_row || tile_bytes(wish, Tiling::whole_rows, kMinTileRows, all) > limit_bytes) return true;
  const WaveModel model{double(chip.multiprocessors)};
  const auto time = [&](const CudaWish& w, Tiling tiling) {
    const CudaPlan tiles = plan(w, tiling);
    return model.pass(w, tiling, tiles.tile_rows, std::min(tiles.chunk, w.shape.vocabulary));
  };
  CudaWish frozen = without_weight(wish);
  frozen.hidden_gradient = true;
  return time(frozen, tiling_of(frozen)) + time(wish, Tiling::weight) < time(wish, tiling_of(wish));
}

inline bool splits(const CudaWish& wish, int64_t limit_bytes, const Chip& chip, bool c_in_row) {
  return splits(wish, limit_bytes, chip, c_in_row,
                [&](const CudaWish& w, Tiling tiling) { return best_tiles(w, tiling, limit_bytes, chip); });
}

// Bytes of the largest pass of a loss, and of the fp32 dW in which the tiles of whole rows add up a bf16 one.
inline int64_t cuda_workspace(const CudaWish& wish, int64_t limit_bytes, const Chip& chip) {
  if (!wish.weight_gradient) return plan_cuda(wish, limit_bytes, chip).bytes;
  const int64_t summed = wish.weight_dtype == Dtype::bf16 ? 4 * wish.shape.vocabulary * wish.shape.hidden : 0;
  if (!wish.can_chunk()) return plan_cuda(wish, limit_bytes, chip).bytes + summed;
  const int64_t split =
      std::max(plan_cuda(without_weight(wish), limit_bytes, chip).bytes, plan_weight(wish, limit_bytes, chip).bytes);
  if (splits(wish, limit_bytes, chip, true)) return split;
  return std::max(split, plan_cuda(wish, limit_bytes, chip).bytes + summed);
}

}  // namespace longgrpo
