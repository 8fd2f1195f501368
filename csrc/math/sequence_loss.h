// Losses whose gradient needs a whole sequence: sequence-level ratios (GSPO), VESPO and GMPO.
//
// With m the loss mask of a sequence and |o| = sum m, a token's gradient is
//   c_t = w_t (direct_t) + follows_t / |o| * sum_t' w_t' shared_t'
// where `shared` is the derivative by the log of the sequence's ratio, on which every token has the same say.
#pragma once

#include "token_loss.h"

namespace longgrpo {

struct SequenceSums {  // over the tokens of the mask
  double count = 0;
  double log_ratio = 0;
  double clipped_log_ratio = 0;  // GMPO
  double log_importance = 0;     // VESPO

  LONGGRPO_HD void add(const LossConfig& config, const Token& token) {
    const float log_ratio_t = token.logp - token.old_logp;
    bool clipped = false;
    count += 1;
    log_ratio += config.type == LossType::vespo ? clamp(log_ratio_t, -kMaxLogRatio, kMaxLogRatio) : log_ratio_t;
    if (config.type == LossType::gmpo) clipped_log_ratio += gmpo_clip(config, log_ratio_t, token.advantage, &clipped);
    if (config.type == LossType::vespo && token.importance > 0) log_importance += vespo_clamp(logf(token.importance));
  }

  LONGGRPO_HD void merge(const SequenceSums& other) {
    count += other.count, log_ratio += other.log_ratio;
    clipped_log_ratio += other.clipped_log_ratio, log_importance += other.log_importance;
  }
};

struct Sequence {
  float count;
  float ratio;         // exp of the mean log ratio
  float policy_ratio;  // the ratio that the policy term uses
  float log_weight;    // VESPO
};

LONGGRPO_HD Sequence finish_sequence(const LossConfig& config, const SequenceSums& sums) {
  const double count = sums.count > 0 ? sums.count : 1;
  Sequence sequence{float(count), importance_ratio(float(sums.log_ratio / count)), 0.0f, 0.0f};
  sequence.policy_ratio =
      config.type == LossType::gmpo ? importance_ratio(float(sums.clipped_log_ratio / count)) : sequence.ratio;
  sequence.log_weight = vespo_clamp(float(sums.log_ratio + sums.log_importance));
  return sequence;
}

struct SequenceTerm {
  TokenTerm token;      // its slopes are the direct ones
  float shared_policy;  // derivatives by the log of the sequence's ratio
  float shared_kl;
  bool follows;  // whether the sequence's ratio moves with this token
};

LONGGRPO_HD SequenceTerm sequence_term(const LossConfig& config, const Token& token, const Sequence& sequence) {
  const float token_ratio = importance_ratio(token.logp - token.old_logp);
  SequenceTerm term{{0, 0, 0, 0, config.sequence_level ? sequence.ratio : token_ratio, false, false}, 0, 0, true};
  PolicyTerm policy{0, 0};
  if (config.type == LossType::vespo) {
    policy = vespo_term(config, sequence.log_weight, token.advantage, token.logp);
    term.token.policy_slope = policy.slope;
  } else if (config.type == LossType::cispo) {
    policy = cispo_term(config, sequence.policy_ratio, token.advantage, token.logp);
    term.token.policy_slope = policy.slope;
  } else {
    policy = ratio_term(config, sequence.policy_ratio, token.advantage);
    term.shared_policy = config.detach ? policy.slope * sequence.policy_ratio : 0.0f;
  }
  if (config.type == LossType::gmpo) {
    bool clipped = false;
    gmpo_clip(config, token.logp - token.old_logp, token.advantage, &clipped);
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
    term.token.kl_slope = config.kl_correction ? ratio * kl.slope : kl.slope;
    if (config.kl_correction && config.sequence_level) term.shared_kl = ratio * kl.value;
    if (config.kl_correction && !config.sequence_level) term.token.kl_slope += ratio * kl.value;
  }
  return term;
}

// A token's part of what all tokens of its sequence share.
LONGGRPO_HD double shared_part(const LossConfig& config, const Token& token, const SequenceTerm& term, float weight) {
  return double(weight) * (policy_part(config, token, term.shared_policy) + config.beta * term.shared_kl);
}

}  // namespace longgrpo
