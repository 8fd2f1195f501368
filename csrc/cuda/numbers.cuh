// bf16 and fp16 as plain bits, and four numbers at a time: 16 bytes of fp32, 8 of a half type.
#pragma once

#include <cstring>

#include "../head/types.h"
#include "device.h"

namespace longgrpo {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(__CUDACC__)
DEVICE float widen(Bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
DEVICE void round_to(float x, Bf16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
DEVICE void round_to(float x, Half& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }
DEVICE uint32_t pack(float low, float high, Bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
DEVICE uint32_t pack(float low, float high, Half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
#else
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline float widen(Half x) {
  _Float16 y;
  std::memcpy(&y, &x.bits, sizeof y);
  return float(y);
}
inline void round_to(float x, Bf16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to.bits = uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline void round_to(float x, Half& to) {
  const _Float16 y = _Float16(x);
  std::memcpy(&to.bits, &y, sizeof y);
}
template <class T>
uint32_t pack(float low, float high, T) {
  T a, b;
  round_to(low, a), round_to(high, b);
  return uint32_t(a.bits) | uint32_t(b.bits) << 16;
}
#endif
DEVICE float widen(float x) { return x; }
DEVICE void round_to(float x, float& to) { to = x; }

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};

// Whether load4 and store4 may begin at p. What callers hand in may begin anywhere; a workspace is aligned.
template <class T>
bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0;
}

DEVICE void load4(const float* from, float (&to)[4]) {
  const Words4 words = *reinterpret_cast<const Words4*>(from);
  memcpy(to, &words, sizeof words);
}
template <class T>
DEVICE void load4(const T* from, float (&to)[4]) {
  const Words2 words = *reinterpret_cast<const Words2*>(from);
  to[0] = widen(T{uint16_t(words.x & 0xffffu)}), to[1] = widen(T{uint16_t(words.x >> 16)});
  to[2] = widen(T{uint16_t(words.y & 0xffffu)}), to[3] = widen(T{uint16_t(words.y >> 16)});
}

DEVICE void store4(float* to, const float (&from)[4]) {
  Words4 words;
  memcpy(&words, from, sizeof words);
  *reinterpret_cast<Words4*>(to) = words;
}
template <class T>
DEVICE void store4(T* to, const float (&from)[4]) {
  *reinterpret_cast<Words2*>(to) = {pack(from[0], from[1], T{}), pack(from[2], from[3], T{})};
}

template <class T>
struct Tag {
  using type = T;
};
template <class F>
void with_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::bf16) return f(Tag<Bf16>{});
  if (dtype == Dtype::f16) return f(Tag<Half>{});
  f(Tag<float>{});
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace longgrpo
