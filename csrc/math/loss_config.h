// Which loss: what the formulas of this folder read, and how it comes from Python.
#pragma once

#include <cstdint>

#include "loss_types.h"

namespace longgrpo {

struct LossConfig {
  LossType type;
  Kl kl;
  bool sequence_level;  // the importance ratio is the sequence's geometric mean (GSPO)
  bool kl_correction;   // k3 weighted by the importance ratio
  bool detach;          // false: the on-policy ratio exp(q - q), whose policy gradient is zero
  Correction correction;
  float beta;
  float epsilon;
  float epsilon_high;
  float delta;  // infinity: no upper bound on the ratio
  float entropy_coef;
  float sapo_temperature_pos, sapo_temperature_neg;
  float vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg;
  float cap;        // of the correction's ratio
  float threshold;  // how far a sequence with a negative advantage may move before it is cut; infinity: as far as it
                    // likes

  // Whether the KL term is a sum over the vocabulary, which the head adds.
  LONGGRPO_HD bool has_exact_kl() const { return beta != 0 && rules(kl).exact; }
  // Whether the head has a gradient other than logp's.
  LONGGRPO_HD bool beyond_logp() const { return entropy_coef != 0 || has_exact_kl(); }
};

constexpr int kOptions = 6, kConstants = 13;

// From `options` and `constants` in the order of the members, as packed() in python/longgrpo/loss/config.py makes them.
template <class Options, class Constants>
LossConfig unpack_config(const Options& options, const Constants& constants) {
  const auto o = [&](int i) { return int(options[i]); };
  const auto f = [&](int i) { return float(constants[i]); };
  return {LossType(o(0)), Kl(o(1)), o(2) != 0, o(3) != 0, o(4) != 0, Correction(o(5)),
          f(0),           f(1),     f(2),      f(3),      f(4),      f(5),
          f(6),           f(7),     f(8),      f(9),      f(10),     f(11),
          f(12)};
}

}  // namespace longgrpo
