#include "token_loss.h"

namespace longgrpo {
namespace {

struct Outputs {
  const float* entropy;
  const float* exact_kl;
  float* logp_gradient;
};

void count(LossSums& sums, const LossConfig& config, const TokenTerm& term, const Token& token, float weight,
           const Outputs& out, int64_t t) {
  sums.add(config, term, token, weight, out.exact_kl ? out.exact_kl[t] : term.kl, out.entropy ? out.entropy[t] : 0.0f,
           out.logp_gradient[t]);
}

void one_token(LossSums& sums, const LossConfig& config, const TokenBatch& batch, const float* logp, const Outputs& out,
               int64_t t) {
  const float weight = batch.weight[t];
  if (weight == 0) {
    out.logp_gradient[t] = 0;
    return;
  }
  const Token token = batch.at(t, logp[t]);
  const TokenTerm term = token_term(config, token);
  out.logp_gradient[t] = logp_gradient(config, term, token, weight);
  count(sums, config, term, token, weight, out, t);
}

void one_sequence(LossSums& sums, const LossConfig& config, const TokenBatch& batch, const float* logp,
                  const Outputs& out, int64_t begin, int64_t end) {
  SequenceSums sequence_sums;
  for (int64_t t = begin; t < end; ++t)
    if (batch.weight[t] != 0) sequence_sums.add(config, batch.at(t, logp[t]));
  const Sequence sequence = finish_sequence(config, sequence_sums);

  double shared = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (batch.weight[t] == 0) continue;
    const Token token = batch.at(t, logp[t]);
    const SequenceTerm term = sequence_term(config, token, sequence);
    shared += double(batch.weight[t]) * (policy_part(config, token, term.shared_policy) + config.beta * term.shared_kl);
  }
  const float share = float(shared / sequence.count);

  for (int64_t t = begin; t < end; ++t) {
    out.logp_gradient[t] = 0;
    const float weight = batch.weight[t];
    if (weight == 0) continue;
    const Token token = batch.at(t, logp[t]);
    const SequenceTerm term = sequence_term(config, token, sequence);
    out.logp_gradient[t] = logp_gradient(config, term.token, token, weight) + (term.follows ? share : 0.0f);
    count(sums, config, term.token, token, weight, out, t);
  }
}

}  // namespace

LossSums token_loss(const LossConfig& config, const TokenBatch& batch, const float* logp, const float* entropy,
                    const float* exact_kl, const int32_t* cu_seqlens, int64_t sequences, float* logp_gradient) {
  LossSums sums;
  const Outputs out{entropy, exact_kl, logp_gradient};
  if (config.needs_sequence()) {
    for (int64_t s = 0; s < sequences; ++s)
      one_sequence(sums, config, batch, logp, out, cu_seqlens[s], cu_seqlens[s + 1]);
  } else {
    for (int64_t t = 0; t < batch.tokens; ++t) one_token(sums, config, batch, logp, out, t);
  }
  return sums;
}

}  // namespace longgrpo
