// Plain passes over matrices: bound by memory, 16 bytes at a time if rows allow it. Grids are a fixed number of
// blocks that stride over the work, so no size is too large for a grid.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace longgrpo {

template <class From, class To, int kThreads>
KERNEL(kThreads)
scale_rows_kernel(const From* from, To* to, const float* scale, int64_t rows, int64_t columns, bool wide) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float factor = scale ? scale[i] : 1.0f;
    const From* const x = from + i * columns;
    To* const y = to + i * columns;
    // Selected, not multiplied, if the factor is 0: a row that nobody asks for may hold NaN.
    const auto scaled = [&](float value) { return factor == 0 ? 0.0f : factor * value; };
    if (wide) {
      for (int64_t j = threadIdx.x * int64_t(kWidth); j < columns; j += kThreads * kWidth) {
        float values[kWidth];
        load4(x + j, values);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[k] = scaled(values[k]);
        store4(y + j, values);
      }
    } else {
      for (int64_t j = threadIdx.x; j < columns; j += kThreads) round_to(scaled(widen(x[j])), y[j]);
    }
  }
}

template <int kThreads>
KERNEL(kThreads)
add_kernel(float* to, const float* from, const float* factor, int64_t n) {
  const float f = factor ? *factor : 1.0f;
  const int64_t step = int64_t(gridDim.x) * kThreads, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t vectors = n / kWidth;
  for (int64_t v = thread; v < vectors; v += step) {
    float a[kWidth], b[kWidth];
    load4(to + v * kWidth, a);
    load4(from + v * kWidth, b);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) a[k] = fmaf(f, b[k], a[k]);
    store4(to + v * kWidth, a);
  }
  for (int64_t j = vectors * kWidth + thread; j < n; j += step) to[j] = fmaf(f, from[j], to[j]);
}

template <class To, int kThreads>
KERNEL(kThreads)
scale_kernel(const float* from, To* to, const float* factor, int64_t n, bool wide) {
  const float f = factor ? *factor : 1.0f;
  const int64_t step = int64_t(gridDim.x) * kThreads, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t vectors = wide ? n / kWidth : 0;
  for (int64_t v = thread; v < vectors; v += step) {
    float values[kWidth];
    load4(from + v * kWidth, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] *= f;
    store4(to + v * kWidth, values);
  }
  for (int64_t j = vectors * kWidth + thread; j < n; j += step) round_to(f * from[j], to[j]);
}

// A thread has four columns of every row: neighbours read neighbours, and each sum has one order.
template <class From, int kThreads>
KERNEL(kThreads)
add_columns_kernel(float* to, const From* from, const float* scale, const float* factor, int64_t rows, int64_t columns,
                   int64_t stride) {
  const int64_t j = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (j >= columns) return;
  float sums[kWidth] = {0, 0, 0, 0};
#pragma unroll 1
  for (int64_t i = 0; i < rows; ++i) {
    const float of_row = scale ? scale[i] : 1.0f;
    if (of_row == 0) continue;
    float x[kWidth];
    load4(from + i * stride + j, x);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sums[k] = fmaf(of_row, x[k], sums[k]);
  }
  const float f = factor ? *factor : 1.0f;
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    if (j + k < columns) to[j + k] = fmaf(f, sums[k], to[j + k]);
}

// One block.
template <int kThreads>
KERNEL(kThreads)
normalize_kernel(const float* from, float* to, float* highest, int64_t n) {
  HighestOrNan mine{0};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) mine.merge({fabsf(from[i])});
  const float all = block_reduce<kThreads>(mine).value;
  if (threadIdx.x == 0) *highest = all;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) to[i] = all == 0 ? 0.0f : from[i] / all;
}

}  // namespace longgrpo
