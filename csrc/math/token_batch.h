// The tokens of a loss as arrays, and the sums over them that make the loss and its metrics.
#pragma once

#include <cstdint>

#include "token_loss.h"

namespace longgrpo {

// Arrays of one entry a token. A weight of 0 marks a token outside the loss: none of its other entries is used.
struct TokenBatch {
  int64_t tokens;
  const float* weight;
  const float* advantage;
  const float* old_logp;    // null: on policy
  const float* ref_logp;    // null where beta is 0
  const float* importance;  // null: 1

  LONGGRPO_HD Token at(int64_t t, float logp) const {
    return {logp, old_logp ? old_logp[t] : logp, ref_logp ? ref_logp[t] : 0.0f, advantage[t],
            importance ? importance[t] : 1.0f};
  }
  // Whether a token of the loss can have a gradient of its own.
  LONGGRPO_HD bool moves(const LossConfig& config, int64_t t) const {
    return config.beta != 0 || config.entropy_coef != 0 || (advantage[t] != 0 && (!importance || importance[t] != 0));
  }
};

// The order is that of METRICS in python/longgrpo/_ops/loss.py. Means are over the tokens of the loss.
struct LossMetrics {
  float policy_loss, kl, entropy, ratio_mean, ratio_min, ratio_max, clip_low, clip_high, active, tokens;
};

struct LossSums {
  double policy = 0, kl_loss = 0, entropy_loss = 0;
  double kl = 0, entropy = 0, ratio = 0;
  float ratio_min = INFINITY, ratio_max = -INFINITY;
  int64_t clip_low = 0, clip_high = 0, active = 0, tokens = 0;

  // `kl_t` is term.kl, or the exact divergence of the row.
  LONGGRPO_HD void add(const LossConfig& config, const TokenTerm& term, const Token& token, float weight, float kl_t,
                       float entropy_t, float logp_gradient) {
    policy += double(weight) * policy_part(config, token, term.policy);
    kl_loss += double(weight) * config.beta * kl_t;
    if (config.entropy_coef != 0) entropy_loss -= double(weight) * config.entropy_coef * entropy_t;
    kl += kl_t;
    entropy += entropy_t;
    ratio += term.ratio;
    ratio_min = term.ratio < ratio_min ? term.ratio : ratio_min;
    ratio_max = term.ratio > ratio_max ? term.ratio : ratio_max;
    clip_low += term.clip_low;
    clip_high += term.clip_high;
    active += logp_gradient != 0;
    tokens += 1;
  }

  LONGGRPO_HD void merge(const LossSums& other) {
    policy += other.policy, kl_loss += other.kl_loss, entropy_loss += other.entropy_loss;
    kl += other.kl, entropy += other.entropy, ratio += other.ratio;
    ratio_min = other.ratio_min < ratio_min ? other.ratio_min : ratio_min;
    ratio_max = other.ratio_max > ratio_max ? other.ratio_max : ratio_max;
    clip_low += other.clip_low, clip_high += other.clip_high, active += other.active, tokens += other.tokens;
  }

  LONGGRPO_HD float loss() const { return float(policy + kl_loss + entropy_loss); }

  LONGGRPO_HD LossMetrics metrics() const {
    const double n = double(tokens > 0 ? tokens : 1);
    const bool any = tokens > 0;
    return {float(policy),          float(kl / n),          float(entropy / n),  any ? float(ratio / n) : 1.0f,
            any ? ratio_min : 1.0f, any ? ratio_max : 1.0f, float(clip_low / n), float(clip_high / n),
            float(active / n),      float(tokens)};
  }
};

}  // namespace longgrpo
