// The online softmax of a row, spread over the threads of a block.
//
// Base 2:  t_j = factor2 (x_j - highest),  sum = sum_j 2^t_j,  weighted = sum_j 2^t_j t_j,  factor2 = factor log2(e).
// The maximum is subtracted before the scale: a multiply-add would leave the rounding of factor2 * highest in every
// t_j, which overflows for logits beyond 1e9. Padding and the target column hold -inf and add nothing.
//
// The order of the sums is part of what a kernel computes: a token's logp is the same bits from every kernel that
// scores it, so that on policy the ratio is exactly 1. Hence groups of kGroup columns, blocks of kBlockColumns columns
// (see rows.cuh), one number of threads for a vocabulary, and no product that a compiler may or may not fuse.
#pragma once

#include "../math/row.h"
#include "numbers.cuh"

namespace longgrpo {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147182f;
constexpr int kGroup = 8;                   // columns of a thread that share a look at the maximum
constexpr float kLowestExponent = -126.0f;  // 2^t is 0 below: keeps 0 times -inf out of `weighted`

struct OnlineSoftmax {
  float factor2, highest = -INFINITY, sum = 0, weighted = 0;

  DEVICE explicit OnlineSoftmax(float factor2) : factor2(factor2) {}

  DEVICE float origin() const { return highest == -INFINITY ? 0.0f : highest; }
  DEVICE float exponent(float x, float from) const { return product(x - from, factor2); }

  DEVICE void raise(float to) {
    if (!(to > highest)) return;
    if (sum != 0) {
      const float shift = exponent(highest, to), ratio = exp2_fast(shift);
      weighted = product(ratio, fmaf(fmaxf(shift, kLowestExponent), sum, weighted));
      sum = product(sum, ratio);
    }
    highest = to;
  }

  DEVICE void add(const float* x) {  // kGroup numbers
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kGroup; ++i) top = fmaxf(top, x[i]);
    raise(top);
    const float from = origin();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float t = exponent(x[i], from), e = exp2_fast(t);
      sum += e;
      weighted = fmaf(e, fmaxf(t, kLowestExponent), weighted);
    }
  }

  DEVICE void merge(OnlineSoftmax other) {
    raise(other.highest);
    other.raise(highest);
    sum += other.sum;
    weighted += other.weighted;
  }

  DEVICE RowSums sums() const { return {sum, product(kLn2, weighted)}; }
};

// Any value with merge(), reduced over the first kLanes lanes that differ in their low bits; every lane gets the
// result.
template <int kLanes, class T>
DEVICE T warp_reduce(T mine) {
  static_assert(sizeof(T) % 4 == 0);
  constexpr int kWords = sizeof(T) / 4;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    uint32_t words[kWords];
    memcpy(words, &mine, sizeof mine);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kFullMask, words[i], distance);
    T other = mine;
    memcpy(&other, words, sizeof other);
    mine.merge(other);
  }
  return mine;
}

// The same over the block, in one fixed order.
template <int kThreads, class T>
DEVICE T block_reduce(T mine) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps * kWarp == kThreads && (kWarps & (kWarps - 1)) == 0);
  SHARED(T[kWarps], partial);
  mine = warp_reduce<kWarp>(mine);
  __syncthreads();  // the readers of an earlier reduction are done
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = mine;
  __syncthreads();
  return warp_reduce<kWarps>(partial[threadIdx.x % kWarps]);
}

struct Sum {
  float value;
  DEVICE void merge(Sum other) { value += other.value; }
};

}  // namespace longgrpo
