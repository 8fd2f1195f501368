// What the CPU head borrows from torch in the extension, without torch: the GEMM of a BLAS, or a loop of our own where
// there is none, and OpenMP's threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/cpu_head.h"
#include "cpu/simd.h"

#ifdef LONGGRPO_BLAS
extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);
#endif

namespace bench {

using longgrpo::Matrix;

// Blocks of B are packed once for all threads, blocks of A by each task; an 8 x 32 tile of C stays in registers.
namespace own {

constexpr int64_t kRows = 8, kColumns = 32, kBlockK = 256, kBlockRows = 64, kBlockColumns = 2048;
typedef float Vector __attribute__((vector_size(64), aligned(4)));

LONGGRPO_CLONES inline void tile(const float* a, const float* b, int64_t k, float* c) {
  Vector sums[kRows][2] = {};
  for (int64_t p = 0; p < k; ++p) {
    const Vector b0 = *reinterpret_cast<const Vector*>(b + p * kColumns);
    const Vector b1 = *reinterpret_cast<const Vector*>(b + p * kColumns + 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] += a[p * kRows + r] * b0;
      sums[r][1] += a[p * kRows + r] * b1;
    }
  }
  std::memcpy(c, sums, sizeof sums);
}

// `width` rows of m from row i as [columns][width], the rows beyond its end 0. For columns of B: the transposed matrix.
inline void pack(const Matrix& m, int64_t i, int64_t column, int64_t columns, int64_t width, float* packed) {
  const int64_t rows = std::min(width, m.rows - i);
  for (int64_t p = 0; p < columns; ++p) {
    const float* from = m.data + i * m.row_stride + (column + p) * m.column_stride;
    float* to = packed + p * width;
    for (int64_t r = 0; r < rows; ++r) to[r] = from[r * m.row_stride];
    std::fill(to + rows, to + width, 0.0f);
  }
}

template <class Runtime>
void gemm(Runtime& runtime, const Matrix& a, const Matrix& b, const Matrix& c) {
  const Matrix columns_of_b = longgrpo::transposed(b);
  std::vector<float> packed_b(size_t(kBlockK * kBlockColumns));
  for (int64_t j = 0; j < c.columns; j += kBlockColumns) {
    const int64_t panels = (std::min(kBlockColumns, c.columns - j) + kColumns - 1) / kColumns;
    for (int64_t p = 0; p < a.columns; p += kBlockK) {
      const int64_t depth = std::min(kBlockK, a.columns - p);
      runtime.parallel_for(panels, [&](int64_t q) {
        pack(columns_of_b, j + q * kColumns, p, depth, kColumns, packed_b.data() + q * kColumns * kBlockK);
      });
      runtime.parallel_for((c.rows + kBlockRows - 1) / kBlockRows, [&](int64_t block) {
        alignas(64) float packed_a[kBlockRows * kBlockK], sums[kRows * kColumns];
        const int64_t begin = block * kBlockRows, end = std::min(c.rows, begin + kBlockRows);
        for (int64_t i = begin; i < end; i += kRows) pack(a, i, p, depth, kRows, packed_a + (i - begin) * kBlockK);
        for (int64_t q = 0; q < panels; ++q) {
          const int64_t column = j + q * kColumns, width = std::min(kColumns, c.columns - column);
          for (int64_t i = begin; i < end; i += kRows) {
            tile(packed_a + (i - begin) * kBlockK, packed_b.data() + q * kColumns * kBlockK, depth, sums);
            for (int64_t r = 0; r < std::min(kRows, end - i); ++r) {
              float* to = c.data + (i + r) * c.row_stride + column;
              for (int64_t x = 0; x < width; ++x) to[x] = sums[r * kColumns + x] + (p > 0 ? to[x] : 0.0f);
            }
          }
        }
      });
    }
  }
}

}  // namespace own

struct HostRuntime {
#ifdef LONGGRPO_BLAS
  static constexpr const char* gemm_name = LONGGRPO_BLAS;

  // BLAS counts by columns, so it is asked for c^T = b^T a^T.
  void gemm(const Matrix& a, const Matrix& b, const Matrix& c) {
    const int m = int(c.columns), n = int(c.rows), k = int(a.columns), ldc = int(c.row_stride);
    const bool b_turned = b.column_stride != 1, a_turned = a.column_stride != 1;
    const int ldb = int(b_turned ? b.column_stride : b.row_stride),
              lda = int(a_turned ? a.column_stride : a.row_stride);
    const float one = 1, zero = 0;
    sgemm_(b_turned ? "T" : "N", a_turned ? "T" : "N", &m, &n, &k, &one, b.data, &ldb, a.data, &lda, &zero, c.data,
           &ldc);
  }
#else
  static constexpr const char* gemm_name = "own loop";

  void gemm(const Matrix& a, const Matrix& b, const Matrix& c) { own::gemm(*this, a, b, c); }
#endif

  int64_t threads() { return omp_get_max_threads(); }
  int64_t chosen_rows(const longgrpo::HeadKey&) { return 0; }

  // Kept between calls, as torch's allocator keeps what is freed.
  struct Scratch {
    void* at;
    void* data() const { return at; }
  };
  Scratch scratch(int64_t bytes) {
    if (int64_t(memory_.size()) < bytes) memory_.resize(size_t(bytes));
    return {memory_.data()};
  }

  template <class F>
  void parallel_for(int64_t n, F&& f) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; ++i) f(i);
  }

 private:
  std::vector<char> memory_;
};

}  // namespace bench
