#include "lanes.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "avx512.h"
#include "simd.h"

namespace longgrpo::lanes {

// ---- float: vectors of the compiler, which it cuts to what the processor has

namespace {

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

template <int Rows, int Halves>
LONGGRPO_INLINE void product_rows(const float* a, int64_t row_stride, int64_t k_stride, int64_t k, const float* panel,
                                  float* c, bool add) {
  Vector sums[Rows][Halves];
  for (int r = 0; r < Rows; ++r) {
    for (int half = 0; half < Halves; ++half) {
      const Vector before = *reinterpret_cast<const Vector*>(c + r * kLanes + 16 * half);
      sums[r][half] = add ? before : Vector{};
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    Vector b[Halves];
    for (int half = 0; half < Halves; ++half)
      b[half] = *reinterpret_cast<const Vector*>(panel + p * kLanes + 16 * half);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const float x = a[r * row_stride + p * k_stride];
      for (int half = 0; half < Halves; ++half) sums[r][half] += x * b[half];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int half = 0; half < Halves; ++half) *reinterpret_cast<Vector*>(c + r * kLanes + 16 * half) = sums[r][half];
  }
}

template <int Halves>
LONGGRPO_INLINE void product_of(const float* a, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                                const float* panel, float* c, bool add) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8)
    product_rows<8, Halves>(a + r * row_stride, row_stride, k_stride, k, panel, c + r * kLanes, add);
  for (; r < rows; ++r)
    product_rows<1, Halves>(a + r * row_stride, row_stride, k_stride, k, panel, c + r * kLanes, add);
}

}  // namespace

LONGGRPO_CLONES void product(const float* a, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                             const float* panel, int64_t lanes, float* c, bool add) {
  if (lanes <= 16) return product_of<1>(a, row_stride, k_stride, rows, k, panel, c, add);
  product_of<2>(a, row_stride, k_stride, rows, k, panel, c, add);
}

void pack(const float* const* rows, int64_t count, int64_t k, float* panel) {
  for (int64_t p = 0; p < k; ++p)
    for (int64_t lane = 0; lane < kLanes; ++lane) panel[p * kLanes + lane] = lane < count ? rows[lane][p] : 0.0f;
}

void store(const float* c, int64_t rows, int64_t lanes, float* const* y, const float* bias) {
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t r = 0; r < rows; ++r) y[lane][r] = c[r * kLanes + lane] + (bias ? bias[r] : 0.0f);
}

// ---- bf16

#ifdef LONGGRPO_AVX512_BF16
namespace {

using avx512::first;

template <int Rows, int Halves>
LONGGRPO_AVX512_BF16 void dot_rows(const Bf16* a, int64_t stride, int64_t pairs, const uint32_t* panel, float* c,
                                   bool add) {
  __m512 sums[Rows][Halves];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < Halves; ++half)
      sums[r][half] = add ? _mm512_loadu_ps(c + r * kLanes + 16 * half) : _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh b[Halves];
#pragma GCC unroll 2
    for (int half = 0; half < Halves; ++half) b[half] = (__m512bh)_mm512_loadu_si512(panel + p * kLanes + 16 * half);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * stride + 2 * p, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int half = 0; half < Halves; ++half) sums[r][half] = _mm512_dpbf16_ps(sums[r][half], x, b[half]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < Halves; ++half) _mm512_storeu_ps(c + r * kLanes + 16 * half, sums[r][half]);
  }
}

template <int Halves>
void dots(const Bf16* a, int64_t stride, int64_t rows, int64_t pairs, const uint32_t* panel, float* c, bool add) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) dot_rows<8, Halves>(a + r * stride, stride, pairs, panel, c + r * kLanes, add);
  for (; r < rows; ++r) dot_rows<1, Halves>(a + r * stride, stride, pairs, panel, c + r * kLanes, add);
}

#ifdef LONGGRPO_AMX
using amx::kDepth, amx::kTile;

// Rows that do not fill a tile are computed in one that zeros fill.
template <int Halves>
void tiles(const Bf16* a, int64_t stride, int64_t rows, int64_t k, const uint32_t* panel, float* c, bool add) {
  int64_t r = 0;
  for (; r + 2 * kTile <= rows; r += 2 * kTile)
    amx::product<2, Halves>(a + r * stride, stride, k, panel, c + r * kLanes, add);
  for (; r + kTile <= rows; r += kTile) amx::product<1, Halves>(a + r * stride, stride, k, panel, c + r * kLanes, add);
  if (r == rows) return;
  thread_local std::vector<Bf16> last;
  last.assign(size_t(kTile * k), 0);
  for (int64_t i = r; i < rows; ++i) std::copy_n(a + i * stride, k, last.data() + (i - r) * k);
  alignas(64) float out[kTile * kLanes];
  const size_t bytes = size_t((rows - r) * kLanes) * sizeof(float);
  if (add) std::memcpy(out, c + r * kLanes, bytes);
  amx::product<1, Halves>(last.data(), k, k, panel, out, add);
  std::memcpy(c + r * kLanes, out, bytes);
}
#else
constexpr int64_t kDepth = 32;
template <int Halves>
void tiles(const Bf16*, int64_t, int64_t, int64_t, const uint32_t*, float*, bool) {}
#endif

template <int Halves>
void products(const Bf16* a, int64_t stride, int64_t rows, int64_t k, const uint32_t* panel, float* c, bool add) {
  // The choice is by k only: the two sum the numbers of a product in different orders.
  if (k % kDepth == 0 && amx::available()) return tiles<Halves>(a, stride, rows, k, panel, c, add);
  dots<Halves>(a, stride, rows, k / 2, panel, c, add);
}

}  // namespace

bool supported() {
  static const bool yes = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return yes;
}

void product(const Bf16* a, int64_t row_stride, int64_t rows, int64_t k, const Bf16* panel, int64_t lanes, float* c,
             bool add) {
  const auto pairs = reinterpret_cast<const uint32_t*>(panel);
  if (lanes <= 16) return products<1>(a, row_stride, rows, k, pairs, c, add);
  products<2>(a, row_stride, rows, k, pairs, c, add);
}

LONGGRPO_AVX512_BF16 void pack(const Bf16* const* rows, int64_t count, int64_t k, Bf16* panel) {
  auto out = reinterpret_cast<uint32_t*>(panel);
  for (int64_t p = 0; p < k; p += 32) {
    const __mmask32 mask = k - p >= 32 ? ~__mmask32(0) : (__mmask32(1) << (k - p)) - 1;
    const int64_t pairs = std::min<int64_t>(16, (k - p) / 2);
    for (int64_t half = 0; half < 2; ++half) {
      __m512i block[16];
      for (int64_t q = 0; q < 16; ++q) {
        const int64_t lane = 16 * half + q;
        block[q] = lane < count ? _mm512_maskz_loadu_epi16(mask, rows[lane] + p) : _mm512_setzero_si512();
      }
      avx512::transpose(block);
      for (int64_t q = 0; q < pairs; ++q) _mm512_storeu_si512(out + (p / 2 + q) * kLanes + 16 * half, block[q]);
    }
  }
}

LONGGRPO_AVX512_BF16 void transpose(const Bf16* values, int64_t stride, int64_t count, int64_t keys, int64_t d,
                                    Bf16* out, int64_t out_stride) {
  for (int64_t j = 0; j < keys; j += 32) {
    for (int64_t i = 0; i < d; i += 16) {
      const __mmask16 mask = first(d - i);
      __m512i block[16];
      for (int64_t q = 0; q < 16; ++q) {
        const int64_t key = j + 2 * q;
        const Bf16* row = values + key * stride + i;
        const __m512i low =
            key < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row)) : _mm512_setzero_si512();
        const __m512i high = key + 1 < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + stride))
                                             : _mm512_setzero_si512();
        block[q] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      }
      avx512::transpose(block);
      for (int64_t q = 0; q < std::min<int64_t>(16, d - i); ++q)
        _mm512_storeu_si512(out + (i + q) * out_stride + j, block[q]);
    }
  }
}

LONGGRPO_AVX512_BF16 void store(const float* c, int64_t rows, int64_t lanes, Bf16* const* y, const Bf16* bias) {
  for (int64_t r = 0; r < rows; r += 16) {
    const __mmask16 mask = first(rows - r);
    __m512 added = _mm512_setzero_ps();
    if (bias) added = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias + r)), 16);
    for (int64_t lane = 0; lane < lanes; lane += 16) {
      __m512i block[16];
      for (int64_t i = 0; i < 16; ++i)
        block[i] = i < rows - r ? _mm512_loadu_si512(c + (r + i) * kLanes + lane) : _mm512_setzero_si512();
      avx512::transpose(block);
      for (int64_t q = 0; q < std::min<int64_t>(16, lanes - lane); ++q) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps((__m512)block[q], added));
        _mm256_mask_storeu_epi16(y[lane + q] + r, mask, rounded);
      }
    }
  }
}

#else

bool supported() { return false; }
void product(const Bf16*, int64_t, int64_t, int64_t, const Bf16*, int64_t, float*, bool) {}
void pack(const Bf16* const*, int64_t, int64_t, Bf16*) {}
void transpose(const Bf16*, int64_t, int64_t, int64_t, int64_t, Bf16*, int64_t) {}
void store(const float*, int64_t, int64_t, Bf16* const*, const Bf16*) {}

#endif

}  // namespace longgrpo::lanes
