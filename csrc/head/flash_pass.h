// The second tiling, for a head that is not trained: tiles of rows x chunks of the vocabulary.
//
//   for a chunk     logits = hidden W_chunk^T;  chunk: running softmax;  sums <- rescale sums + E W_chunk
//   at the end      direction, from the sums and the target's row of W
//
// A tile has many more rows for the same workspace, so that W is read less often and the second GEMM, whose output is
// only rows x hidden, fills the chip. The price is one more pass over rows x hidden numbers a chunk. c = dL/d(logp) is
// known only at the end: it becomes the row's scale, so nothing but a gradient of logp can be had this way.
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

}  // namespace longgrpo
