// The online softmax of a row, spread over the threads of a block.
//
// Base 2:  t_j = factor2 (x_j - highest),  sum = sum_j 2^t_j,  weighted = sum_j 2^t_j t_j,  factor2 = factor log2(e).
// The maximum is subtracted before the scale: a multiply-add would leave the rounding of factor2 * highest in every
// t_j, which overflows for logits beyond 1e9. Padding and the target column hold -inf and add nothing.
//
// The order of the sums is part of what a kernel computes: a token's logp is the same bits from every kernel that
// scores it, so that on policy the ratio is exactly 1. A warp sums kSegment columns that begin at a multiple of
// kSegment of the whole row, relative to their own maximum; fold() joins all segments of a row. So neither the threads
// of a block nor the columns of a chunk, a multiple of kSegment, change a bit; nor does a product that a compiler may
// or may not fuse.
#pragma once

#include "../math/row.h"
#include "launch.h"
#include "numbers.cuh"

namespace longgrpo {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147182f;
constexpr float kLowestExponent = -126.0f;  // 2^t is 0 below: keeps 0 times -inf out of `weighted`

DEVICE float exponent(float x, float highest, float factor2) { return product(x - highest, factor2); }

// Sums over a part of a row, relative to its highest logit.
struct PartSums {
  float highest, sum, weighted;

  DEVICE float origin() const { return highest == -INFINITY ? 0.0f : highest; }

  DEVICE void raise(float to, float factor2) {
    if (!(to > highest)) return;
    if (sum != 0) {
      const float shift = exponent(highest, to, factor2), ratio = exp2_fast(shift);
      weighted = product(ratio, fmaf(fmaxf(shift, kLowestExponent), sum, weighted));
      sum = product(sum, ratio);
    }
    highest = to;
  }

  DEVICE RowSums sums() const { return {sum, product(kLn2, weighted)}; }
};
static_assert(sizeof(PartSums) == kPartBytes);

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

struct Highest {
  float value;
  DEVICE void merge(Highest other) { value = fmaxf(value, other.value); }
};

struct TwoSums {
  float first, second;
  DEVICE void merge(TwoSums other) { first += other.first, second += other.second; }
};

// A whole row from its segments, for every lane of a warp.
DEVICE PartSums fold(const PartSums* parts, int count, float factor2) {
  const int lane = int(threadIdx.x) % kWarp;
  Highest top{-INFINITY};
  for (int k = lane; k < count; k += kWarp) top.merge({parts[k].highest});
  top = warp_reduce<kWarp>(top);
  TwoSums sums{0, 0};
  for (int k = lane; k < count; k += kWarp) {
    PartSums part = parts[k];
    part.raise(top.value, factor2);
    sums.merge({part.sum, part.weighted});
  }
  sums = warp_reduce<kWarp>(sums);
  return {top.value, sums.first, sums.second};
}

// As Highest, but a NaN wins.
struct HighestOrNan {
  float value;
  DEVICE void merge(HighestOrNan other) {
    if (!(other.value <= value)) value = other.value;
  }
};

}  // namespace longgrpo
