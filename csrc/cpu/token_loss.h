// The loss of a batch of tokens on the CPU: value, metrics and c = dL/d(logp). No torch.
#pragma once

#include <cstdint>

#include "../math/sequence_loss.h"
#include "../math/token_batch.h"

namespace longgrpo {

// logp_gradient [tokens] receives c; entropy and exact_kl may be null; cu_seqlens [sequences + 1] is read where
// config.needs_sequence().
LossSums token_loss(const LossConfig& config, const TokenBatch& batch, const float* logp, const float* entropy,
                    const float* exact_kl, const int32_t* cu_seqlens, int64_t sequences, float* logp_gradient);

}  // namespace longgrpo
