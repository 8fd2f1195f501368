#include "attention.h"

#include <cstring>

#include "simd.h"

namespace longgrpo {

using lanes::kLanes;

namespace {

LONGGRPO_CLONES void softmax_step(Softmax& softmax, float* scores, int64_t keys, int64_t first, float scale) {
  alignas(64) float largest[kLanes], sum[kLanes];
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) largest[i] = softmax.largest[i], sum[i] = 0;
  for (int64_t j = 0; j < keys; ++j) {
    float* row = scores + j * kLanes;
    const int32_t key = int32_t(first + j);
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool seen = key >= softmax.begin[i] && key < softmax.end[i];
      row[i] = seen ? scale * row[i] : -INFINITY;
      largest[i] = row[i] > largest[i] ? row[i] : largest[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    const float bounded = largest[i] == -INFINITY ? 0.0f : largest[i];  // a lane that has seen no key yet
    softmax.factor[i] = simd::exp_nonpositive(softmax.largest[i] - bounded);
    softmax.largest[i] = largest[i];
    largest[i] = bounded;
  }
  for (int64_t j = 0; j < keys; ++j) {
    float* row = scores + j * kLanes;
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      row[i] = simd::exp_nonpositive(row[i] - largest[i]);
      sum[i] += row[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) softmax.sum[i] = softmax.sum[i] * softmax.factor[i] + sum[i];
}

LONGGRPO_INLINE uint32_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest;
}

LONGGRPO_CLONES void pairs(const float* probabilities, int64_t count, uint32_t* panel) {
  for (int64_t q = 0; q < count; ++q) {
    const float* row = probabilities + 2 * q * kLanes;
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) panel[q * kLanes + i] = rounded(row[i]) | rounded(row[kLanes + i]) << 16;
  }
}

}  // namespace

void Softmax::step(float* scores, int64_t keys, int64_t first, float scale) {
  softmax_step(*this, scores, keys, first, scale);
}

LONGGRPO_CLONES void scale_lanes(float* rows, int64_t n, const float* factor) {
  for (int64_t j = 0; j < n; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) rows[j * kLanes + i] *= factor[i];
  }
}

lanes::Bf16* as_panel(float* probabilities, int64_t keys, int64_t padded, lanes::Bf16* memory) {
  std::fill(probabilities + keys * kLanes, probabilities + padded * kLanes, 0.0f);
  pairs(probabilities, padded / 2, reinterpret_cast<uint32_t*>(memory));
  return memory;
}

}  // namespace longgrpo
