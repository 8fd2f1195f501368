// Losses whose gradient needs a whole sequence: sequence-level ratios (GSPO), VESPO and GMPO.
//
// With m the loss mask of a sequence and |o| = sum m, a token's gradient is
//   c_t = w_t direct_t + (follows_t policy + kl) / |o|,   policy, kl = sum_t' w_t' shared_t'
// `shared` is the derivative by the log of the sequence's ratio, on which every token has the same say. Direct and
// shared parts may cancel to a small rest (a corrected k3 far from the reference), so both are double.
#pragma once

#include "token_loss.h"

namespace longgrpo {

struct SequenceSums {  // over the tokens of the mask
  double count = 0;
  double log_ratio = 0;
  double bounded_log_ratio = 0;  // as GMPO clips it and VESPO clamps it
  double log_importance = 0;     // VESPO

  LONGGRPO_HD void add(const LossConfig& config, const Token& token) {
    const double log_ratio_t = double(token.logp) - token.old_logp;
    bool clipped = false;
    count += 1;
    log_ratio += log_ratio_t;
    if (config.type == LossType::gmpo) bounded_log_ratio += gmpo_clip(config, log_ratio_t, token.advantage, &clipped);
    if (config.type == LossType::vespo) {
      bounded_log_ratio += clamp(log_ratio_t, -double(kMaxLogRatio), double(kMaxLogRatio));
      if (token.importance > 0) log_importance += vespo_clamp(log(double(token.importance)));
    }
  }

  LONGGRPO_HD void merge(const SequenceSums& other) {
    count += other.count, log_ratio += other.log_ratio;
    bounded_log_ratio += other.bounded_log_ratio, log_importance += other.log_importance;
  }
};

struct Sequence {
  double count;
  float ratio;         // exp of the mean log ratio
  float policy_ratio;  // the ratio that the policy term uses
  double log_weight;   // VESPO
};

LONGGRPO_HD Sequence finish_sequence(const LossConfig& config, const SequenceSums& sums) {
  const double count = sums.count > 0 ? sums.count : 1;
  Sequence sequence{count, importance_ratio(float(sums.log_ratio / count)), 0.0f, 0.0};
  sequence.policy_ratio =
      config.type == LossType::gmpo ? importance_ratio(float(sums.bounded_log_ratio / count)) : sequence.ratio;
  sequence.log_weight = vespo_clamp(sums.bounded_log_ratio + sums.log_importance);
  return sequence;
}

// What all tokens of a sequence share, or one token's part of it.
struct Shared {
  double policy = 0, kl = 0;
  LONGGRPO_HD void merge(const Shared& other) { policy += other.policy, kl += other.kl; }
};

struct SequenceTerm {
  TokenTerm token;  // its slopes are the direct ones
  double kl_slope;  // the direct one again, with the digits that `shared.kl` may leave over
  Shared shared;    // derivatives by the log of the sequence's ratio
  bool follows;     // whether the ratio of the policy term moves with this token
};

LONGGRPO_HD SequenceTerm sequence_term(const LossConfig& config, const Token& token, const Sequence& sequence) {
  const float token_ratio = importance_ratio(token.logp - token.old_logp);
  SequenceTerm term{{0, 0, 0, 0, config.sequence_level ? sequence.ratio : token_ratio, false, false}, 0, {}, true};
  PolicyTerm policy{0, 0};
  if (config.type == LossType::vespo) {
    policy = vespo_term(config, sequence.log_weight, token.advantage, token.logp);
    term.token.policy_slope = policy.slope;
  } else {
    // The sequence's ratio, or the token's own if only a correction asks for the sequence.
    const bool shares = config.sequence_level || config.type == LossType::gmpo;
    const float ratio = shares ? sequence.policy_ratio : token_ratio;
    policy = policy_term(config, ratio, token.advantage, token.logp);
    if (rules(config.type).detached) {
      term.token.policy_slope = policy.slope;
    } else {
      const double slope = config.detach ? double(policy.slope) * ratio : 0.0;
      if (shares)
        term.shared.policy = slope;
      else
        term.token.policy_slope = float(slope);
    }
  }
  if (config.type == LossType::gmpo) {
    bool clipped = false;
    gmpo_clip(config, double(token.logp) - token.old_logp, token.advantage, &clipped);
    policy.clip_low = clipped && token.advantage < 0;
    policy.clip_high = clipped && token.advantage > 0;
    term.follows = !clipped;
  }
  term.token.policy = policy.value;
  term.token.clip_low = policy.clip_low;
  term.token.clip_high = policy.clip_high;
  if (config.beta != 0) {
    const KlTerm kl = kl_term(config.kl, token.logp, token.ref_logp);
    const float ratio = term.token.ratio;
    term.token.kl = config.kl_correction ? ratio * kl.value : kl.value;
    term.kl_slope = kl.slope;
    if (config.kl_correction && config.sequence_level) {
      const double d = double(token.ref_logp) - token.logp;
      const double e = expm1(d < kMaxLogRatio ? d : double(kMaxLogRatio));
      term.kl_slope = -ratio * e;
      if (config.detach) term.shared.kl = ratio * (e - d);
    } else if (config.kl_correction) {
      term.kl_slope = corrected_kl_slope(config, token, kl, ratio);
    }
    term.token.kl_slope = float(term.kl_slope);
  }
  return term;
}

// A token's weighted part of what all tokens of its sequence share.
LONGGRPO_HD Shared shared_part(const LossConfig& config, const Token& token, const SequenceTerm& term, float weight) {
  return {weight * policy_part(config, token, term.shared.policy), weight * (config.beta * term.shared.kl)};
}

// c of a token of weight w, from the sums of its sequence's shared parts.
LONGGRPO_HD float sequence_logp_gradient(const LossConfig& config, const SequenceTerm& term, const Token& token,
                                         float weight, const Shared& shared, const Sequence& sequence) {
  const double direct =
      weight * (policy_part(config, token, double(term.token.policy_slope)) + config.beta * term.kl_slope);
  return float(direct + ((term.follows ? shared.policy : 0.0) + shared.kl) / sequence.count);
}

}  // namespace longgrpo
