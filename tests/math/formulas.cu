// Every formula of csrc/math, called from a kernel: compiled only.
#include "math/row.h"
#include "math/sequence_loss.h"

using namespace longgrpo;

__global__ void formulas(const LossConfig config, const Token* tokens, const RowSums* rows, float* out) {
  const Token token = tokens[threadIdx.x];
  SequenceSums sums;
  sums.add(config, token);
  const SequenceTerm term = sequence_term(config, token, finish_sequence(config, sums));
  const RowSoftmax row = finish_row(rows[threadIdx.x], token.logp);
  const RowGradient gradient{logp_gradient(config, token_term(config, token), token, 1.0f), term.shared_kl, 0.0f};
  out[threadIdx.x] = term.shared_policy + target_logit_gradient(gradient, row.logp, row.entropy);
}
