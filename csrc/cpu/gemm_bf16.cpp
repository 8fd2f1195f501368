#include "gemm_bf16.h"

#include <cstring>

#include "amx.h"
#include "avx512.h"

#ifdef LONGGRPO_AVX512_BF16

namespace longgrpo::bf16 {
namespace {

using avx512::first;
using avx512::transpose;

// Of k at once: all of it, so that C is written once, or little enough for many columns to stay packed. It depends on k
// only, for it decides how a product is summed.
constexpr int64_t kWholeK = 2048, kBlockK = 1024;
constexpr int64_t kVectorRows = 14, kAmxRows = 2 * 16;  // of a tile of C, which has kTileColumns columns
constexpr int64_t kVectorBlock = 8 * kVectorRows, kAmxBlock = 4 * kAmxRows;  // rows of A that are packed at once
// Pairs of bf16 from one row of packed A, and from one panel of packed B, to the next: no power of two, so that they
// fall into different sets of the cache.
constexpr int64_t kRowStride = kWholeK / 2 + 16;
constexpr int64_t panel_stride(int64_t k) { return k / 2 * kTileColumns + 32; }
static_assert(kPackedPairsInAll / kMostThreads / 16 * 16 >= panel_stride(kWholeK));
constexpr int64_t kCached = 8 << 20;  // bytes of C, per thread, that may still be in a cache when they are read next

enum class Store { write, stream, add };

// 32 consecutive elements of k of one row as 16 pairs; beyond `count` they are 0.
LONGGRPO_AVX512_BF16 inline __m512i load_pairs(const Operand& x, int64_t i, int64_t k, int64_t count) {
  if (!x.fp32) {
    const __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
    return _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x.data) + i * x.stride + k);
  }
  const float* source = static_cast<const float*>(x.data) + i * x.stride + k;
  const __m512 low = _mm512_maskz_loadu_ps(first(count), source);
  const __m512 high = count > 16 ? _mm512_maskz_loadu_ps(first(count - 16), source + 16) : _mm512_setzero_ps();
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline void prefetch(const Operand& x, int64_t i, int64_t k) {
  __builtin_prefetch(static_cast<const char*>(x.data) + (i * x.stride + k) * (x.fp32 ? 4 : 2), 0, 2);
}

// Elements k and k + 1 of 16 consecutive i as pairs, where k is the outer index; beyond the counts they are 0.
LONGGRPO_AVX512_BF16 inline __m512i load_interleaved(const Operand& x, int64_t i, int64_t count, int64_t k,
                                                     int64_t k_count) {
  const __mmask16 mask = first(count), second = k_count > 1 ? mask : __mmask16(0);
  if (!x.fp32) {
    const uint16_t* source = static_cast<const uint16_t*>(x.data) + k * x.stride + i;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, source + x.stride));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  const float* source = static_cast<const float*>(x.data) + k * x.stride + i;
  __m512 low = _mm512_maskz_loadu_ps(mask, source), high = _mm512_maskz_loadu_ps(second, source + x.stride);
  if (x.k_scale) {
    low = _mm512_mul_ps(low, _mm512_set1_ps(x.k_scale[k]));
    high = _mm512_mul_ps(high, _mm512_set1_ps(k_count > 1 ? x.k_scale[k + 1] : 0.0f));
  }
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // 16 low, then 16 high
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

LONGGRPO_AVX512_BF16 inline void store_row(__m512 low, __m512 high, int64_t columns, Store store, float* c) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512 sums = half ? high : low;
    const __mmask16 mask = first(std::max<int64_t>(columns - 16 * half, 0));
    float* to = c + 16 * half;
    if (store == Store::stream && mask == 0xffff && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
      _mm512_stream_ps(to, sums);
      continue;
    }
    const __m512 before = store == Store::add ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, sums));
  }
}

template <int Rows>
LONGGRPO_AVX512_BF16 void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t columns, Store store,
                               float* c, int64_t c_stride) {
  __m512 sums[Rows][2];
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512bh b0 = (__m512bh)_mm512_load_si512(b + p * kTileColumns);
    const __m512bh b1 = (__m512bh)_mm512_load_si512(b + p * kTileColumns + 16);
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[r * kRowStride + p]));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, b0);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, b1);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) store_row(sums[r][0], sums[r][1], columns, store, c + r * c_stride);
}

template <int Rows>
void multiply_tile(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t columns, Store store,
                   float* c, int64_t c_stride) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return tile<Rows>(a, b, pairs, columns, store, c, c_stride);
    multiply_tile<Rows - 1>(rows, a, b, pairs, columns, store, c, c_stride);
  }
}

#ifdef LONGGRPO_AMX
// Up to 32 rows. A and B hold zeros up to whole tiles of k.
LONGGRPO_AVX512_BF16 void multiply_by_tiles(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t k,
                                            int64_t columns, Store store, float* c, int64_t c_stride) {
  alignas(64) float sums[2 * amx::kTile * kTileColumns];
  const auto source = reinterpret_cast<const uint16_t*>(a);
  const int64_t stride = 2 * kRowStride, depth = (k + amx::kDepth - 1) / amx::kDepth * amx::kDepth;
  if (rows > amx::kTile)
    columns > 16 ? amx::product<2, 2>(source, stride, depth, b, sums, false)
                 : amx::product<2, 1>(source, stride, depth, b, sums, false);
  else
    columns > 16 ? amx::product<1, 2>(source, stride, depth, b, sums, false)
                 : amx::product<1, 1>(source, stride, depth, b, sums, false);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = sums + r * kTileColumns;
    store_row(_mm512_load_ps(from), _mm512_load_ps(from + 16), columns, store, c + r * c_stride);
  }
}
#else
void multiply_by_tiles(int64_t, const uint32_t*, const uint32_t*, int64_t, int64_t, Store, float*, int64_t) {}
#endif

LONGGRPO_AVX512_BF16 void pack_rows(const Operand& a, int64_t row, int64_t rows, int64_t k, int64_t k_count,
                                    uint32_t* packed) {
  if (a.k_contiguous) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t p = 0; p < k_count; p += 32) {
        prefetch(a, row + r + 1, k + p);
        if (a.fp32) prefetch(a, row + r + 1, k + p + 16);
        _mm512_store_si512(packed + r * kRowStride + p / 2, load_pairs(a, row + r, k + p, k_count - p));
      }
    }
    return;
  }
  for (int64_t p = 0; p < k_count; p += 32) {  // outside, so that neighbouring lines of one k are read together
    for (int64_t r = 0; r < rows; r += 16) {
      __m512i block[16];
      for (int q = 0; q < 16; ++q) {
        const int64_t at = p + 2 * q;
        block[q] = at < k_count ? load_interleaved(a, row + r, rows - r, k + at, k_count - at) : _mm512_setzero_si512();
      }
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(16, rows - r); ++i)
        _mm512_store_si512(packed + (r + i) * kRowStride + p / 2, block[i]);
    }
  }
}

// One panel of kTileColumns columns of B, k contiguous -> [k / 2][kTileColumns] pairs, with zeros up to a multiple
// of 32.
LONGGRPO_AVX512_BF16 void pack_panel(const Operand& b, int64_t column, int64_t columns, int64_t k, int64_t k_count,
                                     uint32_t* packed) {
  for (int64_t half = 0; half < kTileColumns; half += 16) {
    const int64_t count = columns - half;
    for (int64_t p = 0; p < k_count; p += 32) {
      __m512i block[16];
      for (int q = 0; q < 16; ++q) {
        prefetch(b, column + kTileColumns + half + q, k + p);  // 16 streams are too many for the hardware's prefetcher
        block[q] = q < count ? load_pairs(b, column + half + q, k + p, k_count - p) : _mm512_setzero_si512();
      }
      transpose(block);
      for (int64_t q = 0; q < 16; ++q) _mm512_store_si512(packed + (p / 2 + q) * kTileColumns + half, block[q]);
    }
  }
}

// Columns of B, k not contiguous -> the same panels, `stride` apart; all of them at once, because one panel's
// columns are a cache line of each k, and from one k to the next is often a page.
LONGGRPO_AVX512_BF16 void pack_panels(const Operand& b, int64_t column, int64_t columns, int64_t k, int64_t k_count,
                                      int64_t stride, uint32_t* packed) {
  for (int64_t p = 0; p < (k_count + 31) / 32 * 32; p += 2) {
    uint32_t* to = packed + p / 2 * kTileColumns;
    for (int64_t q = 0; q < columns; q += kTileColumns, to += stride) {
      for (int64_t half = 0; half < kTileColumns; half += 16) {
        const int64_t count = columns - q - half;
        const bool there = count > 0 && p < k_count;
        _mm512_store_si512(to + half, there ? load_interleaved(b, column + q + half, count, k + p, k_count - p)
                                            : _mm512_setzero_si512());
      }
    }
  }
}

void pack_columns(const Operand& b, int64_t column, int64_t columns, int64_t k, int64_t k_count, int64_t stride,
                  uint32_t* packed) {
  if (!b.k_contiguous) return pack_panels(b, column, columns, k, k_count, stride, packed);
  for (int64_t q = 0; q < columns; q += kTileColumns)
    pack_panel(b, column + q, columns - q, k, k_count, packed + q / kTileColumns * stride);
}

}  // namespace

bool supported() {
  static const bool yes = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return yes;
}

int64_t tile_rows() { return amx::available() ? kAmxRows : kVectorRows; }

void multiply(const Operand& a, const Operand& b, Range rows, Range columns, int64_t k, bool accumulate, float* c,
              int64_t c_stride, uint32_t* packed_b, int64_t pairs) {
  alignas(64) uint32_t packed_a[kAmxBlock * kRowStride];
  const amx::TileState state;
  const bool by_tiles = amx::available();
  const int64_t block_rows = by_tiles ? kAmxBlock : kVectorBlock, tile_height = tile_rows();
  const int64_t depths = k <= kWholeK ? 1 : (k + kBlockK - 1) / kBlockK;
  const int64_t block_k = ((k + depths - 1) / depths + 31) / 32 * 32, stride = panel_stride(block_k);
  const int64_t block_columns = pairs / stride * kTileColumns;
  const int64_t bytes = (rows.end - rows.begin) * (columns.end - columns.begin) * int64_t(sizeof(float));
  const Store once = depths == 1 && bytes > kCached ? Store::stream : Store::write;
  for (int64_t j = columns.begin; j < columns.end; j += block_columns) {
    const int64_t width = std::min(block_columns, columns.end - j);
    for (int64_t p = 0; p < k; p += block_k) {
      const int64_t depth = std::min(block_k, k - p);
      pack_columns(b, j, width, p, depth, stride, packed_b);
      for (int64_t i = rows.begin; i < rows.end; i += block_rows) {
        const int64_t height = std::min(block_rows, rows.end - i);
        pack_rows(a, i, height, p, depth, packed_a);
        for (int64_t q = 0; q < width; q += kTileColumns) {
          for (int64_t r = 0; r < height; r += tile_height) {
            const int64_t count = std::min(tile_height, height - r), columns_left = std::min(kTileColumns, width - q);
            const uint32_t* from = packed_a + r * kRowStride;
            const uint32_t* panel = packed_b + q / kTileColumns * stride;
            const Store store = accumulate || p > 0 ? Store::add : once;
            float* to = c + (i + r) * c_stride + j + q;
            if (by_tiles)
              multiply_by_tiles(count, from, panel, depth, columns_left, store, to, c_stride);
            else
              multiply_tile<kVectorRows>(count, from, panel, (depth + 1) / 2, columns_left, store, to, c_stride);
          }
        }
      }
    }
  }
  _mm_sfence();  // streamed stores are in no order that another thread's reads could rely on
}

}  // namespace longgrpo::bf16

#else

namespace longgrpo::bf16 {
bool supported() { return false; }
int64_t tile_rows() { return 14; }
void multiply(const Operand&, const Operand&, Range, Range, int64_t, bool, float*, int64_t, uint32_t*, int64_t) {}
}  // namespace longgrpo::bf16

#endif
