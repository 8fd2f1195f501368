// What a loss says of one row of the head: whether the row is skipped, and the row's gradient once its logp is there.
#pragma once

#include "../math/row.h"
#include "../math/sequence_loss.h"
#include "../math/token_batch.h"
#include "types.h"

namespace longgrpo {

inline ExactKl exact_kl_of(const LossConfig& config) {
  if (!config.has_exact_kl()) return ExactKl::none;
  return config.kl == Kl::exact_reverse ? ExactKl::reverse : ExactKl::forward;
}

struct RowLoss {
  enum Kind {
    direction,  // dlogp itself
    given,      // c and e from arrays
    token,      // a token-level loss
    sequence    // c from an array, once the sequences have been summed; the rest from the config
  } kind = direction;
  const float* c = nullptr;       // [tokens]
  const float* e = nullptr;       // [tokens] or null
  const float* weight = nullptr;  // [tokens] or null: 0 marks a token outside the loss
  TokenBatch batch{};
  LossConfig config{};

  LONGGRPO_HD bool skips(int64_t t) const {
    return (weight && weight[t] == 0) || (kind == given && c[t] == 0 && (!e || e[t] == 0));
  }

  LONGGRPO_HD RowGradient operator()(int64_t t, float logp) const {
    if (kind == direction) return {1, 0, 0};
    if (kind == given) return {c[t], e ? e[t] : 0.0f, 0};
    const float w = weight[t];
    return {kind == token ? token_gradient(t, logp) : c[t], -config.entropy_coef * w,
            config.has_exact_kl() ? config.beta * w : 0.0f};
  }

  // Whether a gradient other than logp's is possible.
  LONGGRPO_HD bool beyond_logp() const {
    if (kind == given) return e != nullptr;
    return (kind == token || kind == sequence) && config.beyond_logp();
  }

 private:
  LONGGRPO_HD float token_gradient(int64_t t, float logp) const {
    const Token it = batch.at(config, t, logp);
    return logp_gradient(config, token_term(config, it), it, weight[t]);
  }
};

}  // namespace longgrpo
