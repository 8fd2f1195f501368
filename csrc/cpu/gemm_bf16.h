// C [m, n] (+)= A [m, k] B [k, n] with bf16 operands and fp32 accumulation and output, which torch's CPU GEMM cannot
// give: its bf16 output would round the logits, and fp32 operands cost twice the time. AVX512-BF16 (Zen 4, Cooper Lake
// and later); elsewhere the head upcasts and uses the fp32 GEMM.
//
// Blocks of k and n of B are packed once for all threads; each task packs a block of rows of A on its stack and runs a
// 14 x 32 register tile over them. A product is summed in the order of k whatever the shape of the call is, so a row
// of C depends on nothing but its operands.
#pragma once

#include <algorithm>
#include <cstdint>

namespace longgrpo::bf16 {

bool supported();

constexpr int64_t kTileRows = 14, kTileColumns = 32;  // 28 accumulators of 32 registers
constexpr int64_t kBlockK = 1024;                     // deep: C, which may be larger than any cache, is visited seldom
constexpr int64_t kBlockRows = 8 * kTileRows, kBlockColumns = 1024;
constexpr int64_t kRowStride = kBlockK / 2 + 16;  // pairs; the rows of a tile fall into different cache sets
constexpr int64_t kWorkspaceBytes = kBlockK * kBlockColumns * 2;  // one packed block of B

// Element (i, k) of an operand: i is a row of A or a column of B.
struct Operand {
  const void* data;
  bool fp32;       // rounded to bf16 while it is packed
  int64_t stride;  // of i if `k_contiguous`, else of k; the other one is 1
  bool k_contiguous;
  const float* k_scale;  // multiplies element (i, k) before it is rounded; fp32 only, or null
};

// rows <= kBlockRows and k <= kBlockK of A -> [rows padded to kTileRows][kRowStride] pairs of bf16
void pack_rows(const Operand& a, int64_t row, int64_t rows, int64_t k, int64_t k_count, uint32_t* packed);

// kTileColumns columns and k <= kBlockK of B -> [k / 2][kTileColumns] pairs of bf16
void pack_columns(const Operand& b, int64_t column, int64_t columns, int64_t k, int64_t k_count, uint32_t* packed);

// C [rows <= kTileRows, columns <= kTileColumns] of one packed panel each.
void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t rows, int64_t columns, bool accumulate,
              float* c, int64_t c_stride);

// Rows [begin(i), begin(i + 1)) of C are block i: whole tiles, shared out evenly, so many blocks that each thread has
// the same number of them.
struct RowBlocks {
  int64_t rows, tiles, count;

  RowBlocks(int64_t rows, int64_t threads) : rows(rows), tiles((rows + kTileRows - 1) / kTileRows) {
    const int64_t fewest = (rows + kBlockRows - 1) / kBlockRows;
    count = std::min(tiles, (fewest + threads - 1) / threads * threads);
  }
  int64_t begin(int64_t i) const { return std::min(rows, tiles * i / count * kTileRows); }
};

template <class Runtime>
void gemm(Runtime& runtime, const Operand& a, const Operand& b, int64_t m, int64_t n, int64_t k, bool accumulate,
          float* c, int64_t c_stride, void* workspace) {
  uint32_t* packed_b = static_cast<uint32_t*>(workspace);
  constexpr int64_t panel = kBlockK / 2 * kTileColumns;
  const RowBlocks blocks(m, runtime.threads());
  const int64_t depths = (k + kBlockK - 1) / kBlockK, block_k = ((k + depths - 1) / depths + 31) / 32 * 32;
  for (int64_t j = 0; j < n; j += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, n - j), panels = (columns + kTileColumns - 1) / kTileColumns;
    // Few rows: the columns are shared out as well, at the price of packing A for each share.
    const int64_t shares = std::clamp<int64_t>((runtime.threads() + blocks.count - 1) / blocks.count, 1, panels);
    for (int64_t p = 0; p < k; p += block_k) {
      const int64_t depth = std::min(block_k, k - p), pairs = (depth + 1) / 2;
      runtime.parallel_for(panels, [&](int64_t q) {
        pack_columns(b, j + q * kTileColumns, std::min(kTileColumns, columns - q * kTileColumns), p, depth,
                     packed_b + q * panel);
      });
      runtime.parallel_for(blocks.count * shares, [&](int64_t task) {
        const int64_t block = task / shares, share = task % shares;
        const int64_t i = blocks.begin(block), rows = blocks.begin(block + 1) - i;
        alignas(64) uint32_t packed_a[kBlockRows * kRowStride];
        pack_rows(a, i, rows, p, depth, packed_a);
        for (int64_t q = panels * share / shares; q < panels * (share + 1) / shares; ++q) {
          for (int64_t r = 0; r < rows; r += kTileRows) {
            multiply(packed_a + r * kRowStride, packed_b + q * panel, pairs, std::min(kTileRows, rows - r),
                     std::min(kTileColumns, columns - q * kTileColumns), accumulate || p > 0,
                     c + (i + r) * c_stride + j + q * kTileColumns, c_stride);
          }
        }
      });
    }
  }
}

}  // namespace longgrpo::bf16
