#include "convert.h"

#include <cstring>

#include "simd.h"

namespace longgrpo {
namespace {

#if defined(__aarch64__)
using Half = __fp16;  // GCC 12's C++ knows _Float16 only on x86
#else
using Half = _Float16;
#endif

LONGGRPO_CLONES void from_bf16(const uint16_t* source, float* destination, int64_t n) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(destination);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) bits[i] = uint32_t(source[i]) << 16;
}

LONGGRPO_CLONES void to_bf16(const float* source, float factor, uint16_t* destination, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float value = factor * source[i];
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    destination[i] = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

LONGGRPO_CLONES void from_f16(const Half* source, float* destination, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) destination[i] = float(source[i]);
}

LONGGRPO_CLONES void to_f16(const float* source, float factor, Half* destination, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) destination[i] = Half(factor * source[i]);
}

LONGGRPO_CLONES void scaled_copy(const float* source, float factor, float* destination, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) destination[i] = factor * source[i];
}

}  // namespace

void to_float(const void* source, Dtype dtype, float* destination, int64_t n) {
  if (dtype == Dtype::bf16) return from_bf16(static_cast<const uint16_t*>(source), destination, n);
  if (dtype == Dtype::f16) return from_f16(static_cast<const Half*>(source), destination, n);
  std::memcpy(destination, source, size_t(n) * sizeof(float));
}

void from_float(const float* source, float factor, void* destination, Dtype dtype, int64_t n) {
  if (dtype == Dtype::bf16) return to_bf16(source, factor, static_cast<uint16_t*>(destination), n);
  if (dtype == Dtype::f16) return to_f16(source, factor, static_cast<Half*>(destination), n);
  scaled_copy(source, factor, static_cast<float*>(destination), n);
}

}  // namespace longgrpo
