// The heart: one pass of the language-model head over tiles of rows, for every loss and every device.
//
//   logits = hidden W^T      first GEMM
//   rows                     logp, entropy, the loss's gradient, the signed row: in place, one row at a time
//   direction = row W        second GEMM, left out for rows without gradient
//   dW += row^T hidden       third GEMM, for a trainable head
//
// A whole row of logits is in the workspace at once, so c = dL/d(logp) is known before the second GEMM and a row
// whose c is 0 costs the first GEMM only. The workspace bounds the rows of a tile, not the number of tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "types.h"

namespace longgrpo {

struct HeadPlan {
  int64_t rows;    // rows that are visited
  int64_t active;  // of these, the first `active` may have a gradient
  int64_t tile_rows;
  int64_t staging_bytes;  // what the device's GEMMs need beside the tile
  bool hidden_gradient, weight_gradient;
  bool reference;  // logits of a reference row beside each row (exact KL)

  bool gradient() const { return hidden_gradient || weight_gradient; }
};

// GEMMs of fewer rows may take another kernel, and then another rounding: tiles are padded to this, so that the logp
// of a token does not depend on its neighbours.
constexpr int64_t kMinTileRows = 16;

// Numbers from one row of logits to the next: whole cache lines, and no power of two, which would put all rows of a
// GEMM's tile into one set of the cache (a fifth of its time at V = 32,768).
inline int64_t logits_stride(const HeadShape& shape) { return (shape.vocabulary + 15) / 16 * 16 + 16; }

inline int64_t workspace_bytes(const HeadPlan& plan, const HeadShape& shape, int64_t tile_rows) {
  const int64_t logits = logits_stride(shape) * (plan.reference ? 2 : 1);
  const int64_t hidden = shape.hidden * (1 + (plan.reference ? 1 : 0) + (plan.hidden_gradient ? 1 : 0));
  return 4 * tile_rows * (logits + hidden) + plan.staging_bytes;
}

// least_bytes: of the smallest tile.
inline void check_workspace(int64_t limit_bytes, int64_t least_bytes) {
  if (limit_bytes < least_bytes)
    throw std::invalid_argument("workspace of " + std::to_string(limit_bytes) + " bytes is too small for a tile of " +
                                std::to_string(kMinTileRows) +
                                " rows of this head: give workspace >= " + std::to_string(least_bytes));
}

// Fills tile_rows: as many as the limit allows, tiles of equal size.
inline HeadPlan plan_tiles(HeadPlan plan, const HeadShape& shape, int64_t limit_bytes) {
  check_workspace(limit_bytes, workspace_bytes(plan, shape, kMinTileRows));
  const int64_t per_row = workspace_bytes(plan, shape, 1) - plan.staging_bytes;
  const int64_t limit = (limit_bytes - plan.staging_bytes) / per_row;
  const int64_t tiles = std::max<int64_t>(1, (plan.rows + limit - 1) / limit);
  plan.tile_rows = std::max(kMinTileRows, (plan.rows + tiles - 1) / tiles);
  return plan;
}

// Device: logits(begin, rows); rows(begin, rows, gradient) -> rows with a gradient, moved to the front of the tile;
// hidden_gradient(rows); weight_gradient(rows).
template <class Device>
void head_pass(Device& device, const HeadPlan& plan) {
  for (int64_t begin = 0; begin < plan.rows; begin += plan.tile_rows) {
    const int64_t rows = std::min(plan.tile_rows, plan.rows - begin);
    device.logits(begin, rows);
    const int64_t active = device.rows(begin, rows, plan.gradient() && begin < plan.active);
    if (active == 0) continue;
    if (plan.weight_gradient) device.weight_gradient(active);  // the last to read the hidden tile
    if (plan.hidden_gradient) device.hidden_gradient(active);
  }
}

}  // namespace longgrpo
