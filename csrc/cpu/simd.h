// Vector loops for the compiler to vectorize: plain C++, one clone for each instruction set, chosen at load time.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LONGGRPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LONGGRPO_CLONES
#endif
#define LONGGRPO_INLINE inline __attribute__((always_inline))

namespace longgrpo::simd {

// exp for x <= 0 within 2 ulp; 0 below -87, NaN stays NaN. Cephes' expf, written without branches.
LONGGRPO_INLINE float exp_nonpositive(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float n = __builtin_rintf(bounded * 1.44269504f);
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

// tanh within 2 ulp (Cephes' tanhf).
LONGGRPO_INLINE float tanh(float x) {
  const float a = x < 0 ? -x : x;
  const float e = exp_nonpositive(-2.0f * a);
  const float far = (1.0f - e) / (1.0f + e);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * x + x;
  const float far_signed = x < 0 ? -far : far;
  return a < 0.625f ? near : far_signed;
}

// What the formulas of math/row.h take for exp and tanh.
struct Math {
  static LONGGRPO_INLINE float exp(float x) { return exp_nonpositive(x); }
  static LONGGRPO_INLINE float tanh(float x) { return simd::tanh(x); }
};

}  // namespace longgrpo::simd
