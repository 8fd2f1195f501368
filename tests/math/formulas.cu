// Every formula of csrc/math, called from a kernel: compiled only.
#include "math/row.h"
#include "math/sequence_loss.h"

using namespace longgrpo;

__global__ void formulas(const LossConfig config, const Token* tokens, const RowSums* rows, float* out) {
  const Token token = tokens[threadIdx.x];
  SequenceSums sums;
  sums.add(config, token);
  const Sequence sequence = finish_sequence(config, sums);
  const SequenceTerm term = sequence_term(config, token, sequence);
  const Shared shared = shared_part(config, token, term, 1.0f);
  const RowSoftmax row = finish_row(rows[threadIdx.x], token.logp);
  const RowGradient gradient{logp_gradient(config, token_term(config, token), token, 1.0f), 0.5f, 0.0f};
  out[threadIdx.x] = sequence_logp_gradient(config, term, token, 1.0f, shared, sequence) +
                     target_logit_gradient(gradient, row.logp, row.entropy);
}
