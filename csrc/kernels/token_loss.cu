#include <algorithm>

#include "token_loss.cuh"

namespace longgrpo {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;

int64_t blocks_of(int64_t tokens) { return std::clamp<int64_t>((tokens + kThreads - 1) / kThreads, 1, kMostBlocks); }

}  // namespace

void launch_visited(const LossConfig& config, const TokenBatch& batch, const int64_t* target, const int32_t* cu_seqlens,
                    int64_t sequences, bool report, float* visited, Stream stream) {
  const VisitArguments arguments{config, batch, target, cu_seqlens, report, visited};
  if (!config.needs_sequence())
    launch("visited_tokens_kernel", visited_tokens_kernel<kThreads>, blocks_of(batch.tokens), kThreads, 0, stream,
           arguments);
  else if (sequences > 0)
    launch("visited_sequences_kernel", visited_sequences_kernel<kThreads>, sequences, kThreads, 0, stream, arguments);
}

int64_t loss_partials(const LossConfig& config, int64_t tokens, int64_t sequences) {
  return config.needs_sequence() ? sequences : blocks_of(tokens);
}

void launch_token_loss(const LossConfig& config, const TokenBatch& batch, const float* logp, const float* entropy,
                       const float* exact_kl, const int32_t* cu_seqlens, int64_t sequences, float* logp_gradient,
                       LossSums* partials, float* loss, LossMetrics* metrics, Stream stream) {
  const LossArguments arguments{config, batch, logp, entropy, exact_kl, cu_seqlens, logp_gradient, partials};
  const int64_t blocks = loss_partials(config, batch.tokens, sequences);
  if (!config.needs_sequence())
    launch("token_kernel", token_kernel<kThreads>, blocks, kThreads, 0, stream, arguments);
  else if (blocks > 0)
    launch("sequence_kernel", sequence_kernel<kThreads>, blocks, kThreads, 0, stream, arguments);
  launch("finish_loss_kernel", finish_loss_kernel<kThreads>, 1, kThreads, 0, stream,
         static_cast<const LossSums*>(partials), blocks, loss, metrics);
}

}  // namespace longgrpo
