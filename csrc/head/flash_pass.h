// The head in chunks of the vocabulary, if a loss needs no more of a row than its logp. Two loops over tiles of rows x
// chunks of the vocabulary:
//
//   flash_pass    for a chunk     logits = hidden W_chunk^T;  chunk: softmax sums;  sums += E W_chunk
//                 at the end      logp, and the direction from the sums and the target's row of W
//   weight_pass   for a tile      logits = hidden W_chunk^T;  dlogits, from c and the row's softmax;
//                                 dW_chunk += dlogits^T hidden
//                 at the end      dW_chunk is written once
//
// A tile has many more rows than one of whole rows for the same workspace, so that W is read less often and the second
// GEMM, whose output is only rows x hidden, fills the chip. c = dL/d(logp) is known only at the end of flash_pass: it
// becomes the row's scale. A trained head costs one GEMM more than over whole rows, whose dW [vocabulary, hidden] would
// be read and written for each tile.
#pragma once

#include <algorithm>
#include <cstdint>

namespace longgrpo {

struct FlashPlan {
  int64_t rows;
  int64_t active;  // of these, the first `active` may have a gradient
  int64_t tile_rows, vocabulary, chunk;
};

// Device: chunk_logits(begin, rows, column, columns); chunk(...the same, gradient); accumulate(rows, column, columns);
// finish(begin, rows, gradient).
template <class Device>
void flash_pass(Device& device, const FlashPlan& plan) {
  for (int64_t begin = 0; begin < plan.rows; begin += plan.tile_rows) {
    const int64_t rows = std::min(plan.tile_rows, plan.rows - begin);
    const bool gradient = begin < plan.active;
    for (int64_t column = 0; column < plan.vocabulary; column += plan.chunk) {
      const int64_t columns = std::min(plan.chunk, plan.vocabulary - column);
      device.chunk_logits(begin, rows, column, columns);
      device.chunk(begin, rows, column, columns, gradient);
      if (gradient) device.accumulate(rows, column, columns);
    }
    device.finish(begin, rows, gradient);
  }
}

// Device: weight_rows(begin, rows, column, columns); finish_weight(column, columns).
template <class Device>
void weight_pass(Device& device, const FlashPlan& plan) {
  for (int64_t column = 0; column < plan.vocabulary; column += plan.chunk) {
    const int64_t columns = std::min(plan.chunk, plan.vocabulary - column);
    for (int64_t begin = 0; begin < plan.rows; begin += plan.tile_rows)
      device.weight_rows(begin, std::min(plan.tile_rows, plan.rows - begin), column, columns);
    device.finish_weight(column, columns);
  }
}

}  // namespace longgrpo
