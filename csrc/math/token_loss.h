// Every loss of the GRPO family as one scalar a token: c = dL/d(logp). Each formula stands here and nowhere else; the
// table of the types is loss_types.h.
//
// Sources: GRPO arXiv:2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476, CISPO 2506.13585, GSPO 2507.18071,
// GMPO 2507.20673, SAPO 2511.20347, VESPO 2602.10693; KL estimators: Schulman 2020, "Approximating KL divergence".
#pragma once

#include "loss_config.h"

namespace longgrpo {

constexpr float kMaxLogRatio = 20.0f;  // exp stays finite in fp32, and inf times 0 is NaN

template <class T>
LONGGRPO_HD T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

// The exponential saturates at both ends, in value and slope: d ratio / d log_ratio = ratio everywhere.
LONGGRPO_HD float importance_ratio(float log_ratio) { return expf(clamp(log_ratio, -kMaxLogRatio, kMaxLogRatio)); }

struct PolicyTerm {
  float value;
  float slope;  // derivative by the ratio, or by logp if the ratio is detached
  bool clip_low = false;
  bool clip_high = false;
};

// PPO's clipped surrogate with an optional upper bound delta on the ratio: -min(min(r, delta) A, clip(r) A).
LONGGRPO_HD PolicyTerm ppo_term(const LossConfig& config, float ratio, float advantage) {
  const float low = 1 - config.epsilon, high = 1 + config.epsilon_high;
  const float bounded = ratio > config.delta ? config.delta : ratio;
  const float plain = bounded * advantage, clipped = clamp(ratio, low, high) * advantage;
  PolicyTerm term{-(plain < clipped ? plain : clipped), 0.0f};
  const float upper = config.delta > high ? config.delta : high;
  const float bound = config.delta < high ? config.delta : high;
  // Written so that a NaN ratio or advantage is alive: it must reach the gradient, not vanish in a comparison.
  const bool alive = advantage > 0   ? !(ratio > bound)
                     : advantage < 0 ? !(ratio < low) && !(ratio > upper)
                                     : advantage != 0;
  if (alive) term.slope = -advantage;
  term.clip_low = advantage < 0 && ratio < low;
  term.clip_high = advantage > 0 && ratio > high;
  return term;
}

// SAPO: a sigmoid gate instead of the clip; its temperature depends on the sign of the advantage.
LONGGRPO_HD PolicyTerm sapo_term(const LossConfig& config, float ratio, float advantage) {
  const float t = advantage > 0 ? config.sapo_temperature_pos : config.sapo_temperature_neg;
  const float x = t * (ratio - 1);
  const float gate = 1.0f / (1.0f + expf(-x));
  const float e = expf(-fabsf(x));  // gate (1 - gate) = e / (1 + e)^2, which does not cancel when the gate is open
  return {-(4 / t) * gate * advantage, -4 * (e / ((1 + e) * (1 + e))) * advantage};
}

// CISPO: the capped, detached ratio weighs REINFORCE; epsilon_high is the cap itself.
LONGGRPO_HD PolicyTerm cispo_term(const LossConfig& config, float ratio, float advantage, float logp) {
  const float capped = ratio > config.epsilon_high ? config.epsilon_high : ratio;
  return {-capped * advantage * logp, -capped * advantage, false, ratio > config.epsilon_high};
}

// The policy term of every type that is a function of the token's ratio (or the sequence's in its place) and of logp.
// GMPO's clip is inside its ratio; VESPO's weight is not a ratio (sequence_loss.h).
LONGGRPO_HD PolicyTerm policy_term(const LossConfig& config, float ratio, float advantage, float logp) {
  if (config.type == LossType::cispo) return cispo_term(config, ratio, advantage, logp);
  if (config.type == LossType::sapo) return sapo_term(config, ratio, advantage);
  if (config.type == LossType::gmpo) return {-ratio * advantage, -advantage};
  return ppo_term(config, ratio, advantage);
}

LONGGRPO_HD double vespo_clamp(double log_weight) {
  return clamp(log_weight, -18.420680743952367 /* log 1e-8 */, double(kMaxLogRatio));
}

// VESPO: a detached weight that falls off on both sides of a log weight of 0.
LONGGRPO_HD PolicyTerm vespo_term(const LossConfig& config, double log_weight, float advantage, float logp) {
  const double k = advantage >= 0 ? config.vespo_k_pos : config.vespo_k_neg;
  const double lambda = advantage >= 0 ? config.vespo_lambda_pos : config.vespo_lambda_neg;
  const float phi = float(exp(lambda + k * log_weight - lambda * exp(log_weight)));
  return {-phi * advantage * logp, -phi * advantage};
}

// GMPO clips each token's log ratio before the geometric mean.
LONGGRPO_HD double gmpo_clip(const LossConfig& config, double log_ratio, float advantage, bool* clipped) {
  *clipped = advantage > 0 ? log_ratio > config.epsilon_high : log_ratio < -config.epsilon;
  if (!*clipped) return log_ratio;
  return advantage > 0 ? config.epsilon_high : -config.epsilon;
}

// What an off-policy correction multiplies the policy term by, from its ratio; `cut` if that is not the ratio itself.
LONGGRPO_HD float correction_factor(const LossConfig& config, float ratio, bool* cut) {
  if (config.correction == Correction::none) return *cut = false, 1.0f;
  *cut = ratio > config.cap || (rules(config.correction).masks && ratio < 1 / config.cap);
  if (!*cut) return ratio;  // a NaN too
  return rules(config.correction).masks ? 0.0f : config.cap;
}

struct KlTerm {
  float value;
  float slope;  // derivative by logp as the estimator defines it, see docs
};

// D = ref - logp. Beyond D = 20 the exponential saturates in the value and in the slope; the slope keeps its sign.
LONGGRPO_HD KlTerm kl_term(Kl kl, float logp, float ref) {
  const float d = ref - logp;
  const float bounded = d < kMaxLogRatio ? d : kMaxLogRatio;
  const float k3 = expm1f(bounded) - d;
  switch (kl) {
    case Kl::k1:
      return {-d, 1.0f};
    case Kl::abs:
      return {fabsf(d), d < 0 ? 1.0f : (d > 0 ? -1.0f : 0.0f)};
    case Kl::k2:
      return {0.5f * d * d, -d};
    case Kl::k3:
      return {k3, -expm1f(bounded)};
    case Kl::k3_plus:
      return {k3, -d};
    case Kl::forward:
      return {expf(bounded) * d, -expf(bounded) * (1 + d)};
    case Kl::forward_unbiased:
      return {expf(bounded) * d, -expf(bounded)};
    case Kl::article_reverse:
      return {expf(logp) * k3, -expf(logp) * d};
    case Kl::article_forward:
      return {expf(ref) * d, -expf(ref)};
    default:  // the exact divergences are sums over the vocabulary: the head adds them
      return {0.0f, 0.0f};
  }
}

struct Token {
  float logp;
  float old_logp;  // logp itself on policy
  float ref_logp;  // read only if beta != 0
  float advantage;
  float importance;  // weighs only the policy term: what the caller hands in times the correction's factor
  // Of the sampling policy; 0, 1 and false if its logp is not known.
  float sampling_difference = 0;  // |old_logp - sampling_logp|
  float sampling_ratio = 1;
  bool cut = false;
};

struct TokenTerm {
  float policy, policy_slope;  // value and derivative by logp, not yet weighted
  float kl, kl_slope;
  float ratio;
  bool clip_low, clip_high;
};

// d (ratio k3) / d logp with the token's own ratio: its two parts cancel to ratio (logp - ref).
LONGGRPO_HD float corrected_kl_slope(const LossConfig& config, const Token& token, const KlTerm& kl, float ratio) {
  return ratio * (config.detach ? token.logp - token.ref_logp : kl.slope);  // without the detach the ratio is constant
}

// A token-level loss: everything is known from the token itself.
LONGGRPO_HD TokenTerm token_term(const LossConfig& config, const Token& token) {
  const float ratio = importance_ratio(token.logp - token.old_logp);
  const PolicyTerm policy = policy_term(config, ratio, token.advantage, token.logp);
  const float slope = rules(config.type).detached ? policy.slope : (config.detach ? policy.slope * ratio : 0.0f);
  TokenTerm term{policy.value, slope, 0.0f, 0.0f, ratio, policy.clip_low, policy.clip_high};
  if (config.beta != 0) {
    const KlTerm kl = kl_term(config.kl, token.logp, token.ref_logp);
    term.kl = config.kl_correction ? ratio * kl.value : kl.value;
    term.kl_slope = config.kl_correction ? corrected_kl_slope(config, token, kl, ratio) : kl.slope;
  }
  return term;
}

// What multiplies the policy term. An importance of 0 is a mask; VESPO has the ratio itself inside its weight.
template <class T>
LONGGRPO_HD T policy_part(const LossConfig& config, const Token& token, T value) {
  if (token.importance == 0) return 0;  // selected, not multiplied: the masked value may be inf or NaN
  return config.type == LossType::vespo ? value : token.importance * value;
}

// c = dL/d(logp) for a token of weight w.
LONGGRPO_HD float logp_gradient(const LossConfig& config, const TokenTerm& term, const Token& token, float weight) {
  return weight * (policy_part(config, token, term.policy_slope) + config.beta * term.kl_slope);
}

}  // namespace longgrpo
