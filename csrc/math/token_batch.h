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
  const float* old_logp;       // null: on policy
  const float* ref_logp;       // null if beta is 0
  const float* importance;     // null: 1
  const float* sampling_logp;  // null: not known
  // Made by the sweep over sequences (LossArguments::correct in head/sweeps.h), null if the loss has none:
  const float* sequence_ratio = nullptr;  // of the off-policy correction
  const float* kept = nullptr;            // 0: the sequence has moved too far

  LONGGRPO_HD Token at(const LossConfig& config, int64_t t, float logp) const {
    Token token{logp, old_logp ? old_logp[t] : logp, ref_logp ? ref_logp[t] : 0.0f, advantage[t],
                importance ? importance[t] : 1.0f};
    if (sampling_logp) {
      const float log_ratio = token.old_logp - sampling_logp[t];
      token.sampling_difference = fabsf(log_ratio);
      token.sampling_ratio = sequence_ratio ? sequence_ratio[t] : importance_ratio(log_ratio);
      const float factor = correction_factor(config, token.sampling_ratio, &token.cut);
      // A 0 is a mask, selected and not multiplied.
      if (token.importance != 0) token.importance = factor == 0 ? 0.0f : token.importance * factor;
    }
    if (kept && kept[t] == 0) token.importance = 0;
    return token;
  }

  // Whether a token of the loss can have a gradient of its own.
  LONGGRPO_HD bool moves(const LossConfig& config, int64_t t) const {
    return config.beta != 0 || config.entropy_coef != 0 || (advantage[t] != 0 && (!importance || importance[t] != 0));
  }

  // ---- when is c = dL/d(logp) known? ----

  // Whether the correction's ratio is a sequence's. With old_logp it is known before any pass of the head.
  LONGGRPO_HD bool corrects_sequences(const LossConfig& config) const {
    return sampling_logp && rules(config.correction).of_sequence;
  }
  // Whether sequences are cut that have moved too far; none has moved on policy.
  LONGGRPO_HD bool cuts_sequences(const LossConfig& config) const { return old_logp && config.threshold < INFINITY; }
  // Whether c needs all of a sequence's logp; otherwise it is known in the row.
  LONGGRPO_HD bool needs_sequence(const LossConfig& config) const {
    return config.sequence_level || rules(config.type).whole_sequence || cuts_sequences(config) ||
           (corrects_sequences(config) && !old_logp);
  }
};

// The order is that of METRICS in python/longgrpo/_ops/loss.py. Means are over the tokens of the loss.
struct LossMetrics {
  float policy_loss, kl, entropy, ratio_mean, ratio_min, ratio_max, clip_low, clip_high, active, tokens;
  float sampling_diff_mean, sampling_diff_max, sampling_ratio_mean, sampling_cut;  // if sampling_logp is known
};

struct LossSums {
  double policy = 0, kl_loss = 0, entropy_loss = 0;
  double kl = 0, entropy = 0, ratio = 0;
  float ratio_min = INFINITY, ratio_max = -INFINITY;
  double sampling_difference = 0, sampling_ratio = 0;
  float largest_difference = 0;
  int64_t clip_low = 0, clip_high = 0, active = 0, tokens = 0, cut = 0;

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
    sampling_difference += token.sampling_difference;
    sampling_ratio += token.sampling_ratio;
    largest_difference = larger(largest_difference, token.sampling_difference);
    cut += token.cut;
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
    sampling_difference += other.sampling_difference, sampling_ratio += other.sampling_ratio;
    largest_difference = larger(largest_difference, other.largest_difference);
    clip_low += other.clip_low, clip_high += other.clip_high, active += other.active, tokens += other.tokens;
    cut += other.cut;
  }

  LONGGRPO_HD float loss() const { return float(policy + kl_loss + entropy_loss); }

  LONGGRPO_HD LossMetrics metrics() const {
    const double n = double(tokens > 0 ? tokens : 1);
    const bool any = tokens > 0;
    return {float(policy),
            float(kl / n),
            float(entropy / n),
            any ? float(ratio / n) : 1.0f,
            any ? ratio_min : 1.0f,
            any ? ratio_max : 1.0f,
            float(clip_low / n),
            float(clip_high / n),
            float(active / n),
            float(tokens),
            float(sampling_difference / n),
            largest_difference,
            any ? float(sampling_ratio / n) : 1.0f,
            float(cut / n)};
  }

 private:
  LONGGRPO_HD static float larger(float a, float b) { return a > b || a != a ? a : b; }  // a NaN stays
};

}  // namespace longgrpo
