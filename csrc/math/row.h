// One column of a row of logits, on every device: the transform of the logit, and dL/dz for everything that a loss can
// ask of a row.
//
// `Math` names the device's own exp and tanh: Math::exp(x) for x <= 0, 0 if fp32 has no number for it, and
// Math::tanh(x).
#pragma once

#include "softmax.h"

namespace longgrpo {

// ---- x' = cap(scale (x + bias)), cap(x) = C tanh(x / C); z = x' / temperature ----

LONGGRPO_COLUMN float scaled_logit(float x, float bias, float scale) { return scale * (x + bias); }

// `to_cap` is 1 / C, or carries a scale that was not applied yet.
template <class Math>
LONGGRPO_COLUMN float capped_logit(float x, float cap, float to_cap) {
  return cap * Math::tanh(x * to_cap);
}

// dx'/dx of the cap from x' itself, 1 - tanh^2 without its cancellation; 1 if inverse_cap is 0.
LONGGRPO_COLUMN float cap_slope(float capped, float inverse_cap) {
  const float t = capped * inverse_cap;
  return (1.0f - t) * (1.0f + t);
}

// ---- dL/dz, from d = log p of the column ----

// exp is 0 below: keeps 0 times -inf out of p log p.
constexpr float kLowestLogP = -87.0f;

// dL/d(logp), dL/d(entropy) and the weight of the exact KL of one row: all that a loss ever tells the head.
struct RowGradient {
  float logp;
  float entropy;
  float kl;

  // A common factor that keeps the signed row near 1, whatever the loss's normalizer is. A NaN stays.
  LONGGRPO_HD float scale() const {
    float largest = fabsf(logp);
    if (fabsf(entropy) > largest) largest = fabsf(entropy);
    return fabsf(kl) > largest ? fabsf(kl) : largest;
  }
  LONGGRPO_HD RowGradient over(float scale) const { return {logp / scale, entropy / scale, kl / scale}; }
};

// dL/dz_j = c (1[j = y] - p_j) - e p_j (log p_j + entropy), for j other than the target.
template <class Math>
LONGGRPO_COLUMN float logit_gradient(const RowGradient& g, float d, float entropy) {
  return -Math::exp(d) * (g.logp + g.entropy * ((d < kLowestLogP ? kLowestLogP : d) + entropy));
}

// The same at the target, with full relative accuracy.
LONGGRPO_HD float target_logit_gradient(const RowGradient& g, float logp, float entropy) {
  const float entropy_part = g.entropy == 0 ? 0.0f : g.entropy * expf(logp) * (logp + entropy);
  return -g.logp * expm1f(logp) - entropy_part;
}

// ---- the exact KL between a row and its reference, from both columns' log p ----

// p (log p - log q), the column's part of KL(p || q)
template <class Math>
LONGGRPO_COLUMN float divergence_term(float p_logp, float q_logp) {
  const float p = Math::exp(p_logp);
  const float term = p * (p_logp - q_logp);
  return p == 0.0f ? 0.0f : term;
}

// d KL(row || reference) / dz_j = p_j ((log p_j - log r_j) - KL)
template <class Math>
LONGGRPO_COLUMN float reverse_kl_gradient(float weight, float d, float reference, float divergence) {
  const float p = Math::exp(d);
  const float term = weight * p * ((d - reference) - divergence);
  return p == 0.0f ? 0.0f : term;
}

// d KL(reference || row) / dz_j = p_j - r_j
template <class Math>
LONGGRPO_COLUMN float forward_kl_gradient(float weight, float d, float reference) {
  return weight * (Math::exp(d) - Math::exp(reference));
}

}  // namespace longgrpo
