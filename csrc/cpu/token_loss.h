// The loss of a batch of tokens on the CPU: value, metrics and c = dL/d(logp). No torch.
#pragma once

#include <cstdint>

#include "../math/sequence_loss.h"

namespace longgrpo {

// Arrays of one entry a token. A weight of 0 marks a token outside the loss: none of its other entries is used.
struct TokenBatch {
  int64_t tokens;
  const float* weight;
  const float* advantage;
  const float* old_logp;    // null: on policy
  const float* ref_logp;    // null where beta is 0
  const float* importance;  // null: 1

  Token at(int64_t t, float logp) const {
    return {logp, old_logp ? old_logp[t] : logp, ref_logp ? ref_logp[t] : 0.0f, advantage[t],
            importance ? importance[t] : 1.0f};
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

  float loss() const { return float(policy + kl_loss + entropy_loss); }
  LossMetrics metrics() const;
};

// logp_gradient [tokens] receives c; entropy and exact_kl may be null; cu_seqlens [sequences + 1] is read where
// config.needs_sequence().
LossSums token_loss(const LossConfig& config, const TokenBatch& batch, const float* logp, const float* entropy,
                    const float* exact_kl, const int32_t* cu_seqlens, int64_t sequences, float* logp_gradient);

}  // namespace longgrpo
