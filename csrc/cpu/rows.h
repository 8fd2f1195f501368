// Row operations on fp32 logits: log-softmax at the target, entropy, and the signed row that the second GEMM turns
// into a gradient. One call works on one row of `vocabulary` columns, in place. No torch, no threads.
#pragma once

#include <cstdint>

#include "../head/types.h"
#include "../math/row.h"

namespace longgrpo {

// Applies bias and cap in place. Returns the factor that is left: z_j = factor * x[j].
float prepare_row(const LogitTransform& transform, float temperature, float* x);

// A row after its statistics: log p_j = factor (x_j - max_x) - offset.
struct RowStatistics {
  float factor;
  float max_x;  // over all columns but the target
  RowSoftmax softmax;
};

// With `keep`, x_j becomes exp(z_j - max) and x_target the negative sum of the others: the signed row of dlogp/dz up to
// the factor -exp(-offset), without a further sweep.
RowStatistics read_row(float* x, int64_t vocabulary, int64_t target, float factor, bool entropy, bool keep);

struct ReferenceRow {
  ExactKl kind = ExactKl::none;
  const float* x = nullptr;
  RowStatistics statistics{};
  float divergence = 0;
};

// KL between a row and a reference row over the whole vocabulary.
float exact_kl(const float* x, int64_t vocabulary, const RowStatistics& row, const ReferenceRow& reference);

// x becomes dL/dx', the signed row for any gradient; the target's entry keeps full relative accuracy.
void sign_row(const LogitTransform& transform, float* x, int64_t target, const RowStatistics& row,
              const RowGradient& gradient, const ReferenceRow& reference);

}  // namespace longgrpo
