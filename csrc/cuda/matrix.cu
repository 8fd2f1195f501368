#include <algorithm>

#include "matrix.cuh"

namespace longgrpo {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 4096;  // several waves on any card; each block strides over the rest

}  // namespace

void launch_scale_rows(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, const float* scale, int64_t rows,
                       int64_t columns, Stream stream) {
  if (rows == 0 || columns == 0) return;
  with_type(from_dtype, [&](auto from_tag) {
    with_type(to_dtype, [&](auto to_tag) {
      using From = typename decltype(from_tag)::type;
      using To = typename decltype(to_tag)::type;
      const auto* const x = static_cast<const From*>(from);
      auto* const y = static_cast<To*>(to);
      const bool wide = columns % kWidth == 0 && is_aligned(x) && is_aligned(y);
      launch("scale_rows_kernel", scale_rows_kernel<From, To, kThreads>, std::min(rows, kMostBlocks), kThreads, 0,
             stream, x, y, scale, rows, columns, wide);
    });
  });
}

void launch_add(float* to, const float* from, const float* factor, int64_t n, Stream stream) {
  const int64_t blocks = std::clamp<int64_t>((n / kWidth + kThreads - 1) / kThreads, 1, kMostBlocks);
  launch("add_kernel", add_kernel<kThreads>, blocks, kThreads, 0, stream, to, from, factor, n);
}

void launch_scale(const float* from, void* to, Dtype dtype, const float* factor, int64_t n, Stream stream) {
  const int64_t blocks = std::clamp<int64_t>((n / kWidth + kThreads - 1) / kThreads, 1, kMostBlocks);
  with_type(dtype, [&](auto tag) {
    using To = typename decltype(tag)::type;
    To* const y = static_cast<To*>(to);
    launch("scale_kernel", scale_kernel<To, kThreads>, blocks, kThreads, 0, stream, from, y, factor, n,
           is_aligned(from) && is_aligned(y));
  });
}

void launch_add_columns(float* to, const void* from, Dtype dtype, const float* scale, const float* factor, int64_t rows,
                        int64_t columns, int64_t stride, Stream stream) {
  with_type(dtype, [&](auto tag) {
    using From = typename decltype(tag)::type;
    constexpr int64_t kColumns = kThreads * kWidth;
    launch("add_columns_kernel", add_columns_kernel<From, kThreads>, (columns + kColumns - 1) / kColumns, kThreads, 0,
           stream, to, static_cast<const From*>(from), scale, factor, rows, columns, stride);
  });
}

void launch_normalize(const float* from, float* to, float* highest, int64_t n, Stream stream) {
  launch("normalize_kernel", normalize_kernel<kThreads>, 1, kThreads, 0, stream, from, to, highest, n);
}

}  // namespace longgrpo
