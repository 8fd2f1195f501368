// C [m, n] (+)= A [m, k] B [k, n] with bf16 operands and fp32 accumulation and output, which torch's CPU GEMM cannot
// give: its bf16 output would round the logits, and fp32 operands cost twice the time. By AMX tiles where the processor
// has them (Sapphire Rapids and later), else by AVX512-BF16 (Zen 4, Cooper Lake and later); elsewhere the head upcasts
// and uses the fp32 GEMM.
//
// Each thread has a rectangle of C and packs what it reads by itself: packed operands that threads share are written by
// one core and read by another, which took a third of the time if the two have no cache in common. A product is
// summed in the order of k whatever the shape of the call is, so a row of C depends on nothing but its operands.
#pragma once

#include <algorithm>
#include <cstdint>

namespace longgrpo::bf16 {

bool supported();

// Element (i, k) of an operand: i is a row of A or a column of B.
struct Operand {
  const void* data;
  bool fp32;       // rounded to bf16 while it is packed
  int64_t stride;  // of i if `k_contiguous`, else of k; the other one is 1
  bool k_contiguous;
  const float* k_scale;  // multiplies element (i, k) before it is rounded; fp32 only, or null
};

constexpr int64_t kTileColumns = 32;
int64_t tile_rows();  // of C in registers: 32 in four tiles of AMX, else 14 in 28 accumulators of 32 registers

// A thread's packed columns of B, in pairs of bf16: 1,024 columns of 1,024 elements, fewer if there are many threads.
constexpr int64_t kPackedPairs = 1024 * 1024 / 2 + 1024, kPackedPairsInAll = 8 * kPackedPairs, kMostThreads = 128;

inline int64_t workspace_bytes(int64_t threads) {
  return std::min(threads * kPackedPairs, kPackedPairsInAll) * int64_t(sizeof(uint32_t));
}

struct Range {
  int64_t begin, end;
};

// C[rows, columns] of the product, in one thread, with room for so many packed pairs of B.
void multiply(const Operand& a, const Operand& b, Range rows, Range columns, int64_t k, bool accumulate, float* c,
              int64_t c_stride, uint32_t* packed_b, int64_t pairs);

// Into how many ranges of rows and of columns C is cut: whole tiles, a rectangle a thread.
struct Grid {
  int64_t rows, columns;

  Grid(int64_t m, int64_t n, int64_t threads) {
    int64_t best = INT64_MAX;
    for (int64_t r = 1; r <= threads; ++r) {
      const int64_t height = size(m, tile_rows(), r), width = size(n, kTileColumns, threads / r);
      // Of a step in k: 32 products take about as long as one element that is packed.
      const int64_t cost = height * width / 32 + height + width;
      if (cost < best) best = cost, rows = r, columns = threads / r;
    }
  }

  // Of n, the i-th of `count` ranges of whole tiles.
  static Range range(int64_t n, int64_t tile, int64_t count, int64_t i) {
    const int64_t tiles = (n + tile - 1) / tile;
    return {std::min(n, tiles * i / count * tile), std::min(n, tiles * (i + 1) / count * tile)};
  }

 private:
  static int64_t size(int64_t n, int64_t tile, int64_t count) {
    return ((n + tile - 1) / tile + count - 1) / count * tile;
  }
};

// `workspace`: workspace_bytes(runtime.threads()), in whole cache lines.
template <class Runtime>
void gemm(Runtime& runtime, const Operand& a, const Operand& b, int64_t m, int64_t n, int64_t k, bool accumulate,
          float* c, int64_t c_stride, void* workspace) {
  const Grid grid(m, n, std::min(runtime.threads(), kMostThreads));
  const int64_t count = grid.rows * grid.columns, pairs = std::min(kPackedPairs, kPackedPairsInAll / count / 16 * 16);
  runtime.parallel_for(count, [&](int64_t i) {
    multiply(a, b, Grid::range(m, tile_rows(), grid.rows, i / grid.columns),
             Grid::range(n, kTileColumns, grid.columns, i % grid.columns), k, accumulate, c, c_stride,
             static_cast<uint32_t*>(workspace) + i * pairs, pairs);
  });
}

}  // namespace longgrpo::bf16
