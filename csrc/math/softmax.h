// One softmax row, seen from its target column.
//
// The plain form logp = z_y - LSE is exactly 0 for a confident token, and so is its gradient. Leaving the target out of
// the sum keeps both:   logp = -softplus(LSE_rest - z_y),   1 - p_y = -expm1(logp).
#pragma once

#include "portable.h"

namespace longgrpo {

// Sums over every column but the target, relative to their maximum.
struct RowSums {
  float sum;       // sum_j exp(z_j - max)
  float weighted;  // sum_j exp(z_j - max) (z_j - max), for the entropy
};

struct RowSoftmax {
  float logp;     // log p_y
  float entropy;  // -sum_j p_j log p_j, the target included
  float offset;   // LSE - max with the whole row's LSE: log p_j = z_j - max - offset
};

LONGGRPO_HD float softplus(float x) { return (x > 0 ? x : 0.0f) + log1pf(expf(-fabsf(x))); }

// target_z is z_y - max.
LONGGRPO_HD RowSoftmax finish_row(const RowSums& rest, float target_z) {
  if (rest.sum == 0) return {0.0f, 0.0f, target_z};  // no other finite logit
  const float log_sum = logf(rest.sum);
  const float margin = log_sum - target_z;  // LSE_rest - z_y
  const float logp = -softplus(margin);
  const float offset = log_sum + softplus(-margin);
  // Every term has one sign, so nothing cancels for a confident token.
  const float rest_entropy = expf(-offset) * (offset * rest.sum - rest.weighted);
  const float target_entropy = logp == -INFINITY ? 0.0f : -expf(logp) * logp;
  return {logp, rest_entropy + target_entropy, offset};
}

}  // namespace longgrpo
