#include <algorithm>

#include "token_loss.cuh"

namespace longgrpo {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;

int64_t blocks_of(int64_t tokens) { return std::clamp<int64_t>((tokens + kThreads - 1) / kThreads, 1, kMostBlocks); }

}  // namespace

void launch_visited(const Visits& visits, float* weight, Stream stream) {
  if (!visits.batch.needs_sequence(visits.config))
    launch("visited_tokens_kernel", visited_tokens_kernel<kThreads>, blocks_of(visits.batch.tokens), kThreads, 0,
           stream, visits, weight);
  else if (visits.sequences.count > 0)
    launch("visited_sequences_kernel", visited_sequences_kernel<kThreads>, visits.sequences.count, kThreads, 0, stream,
           visits, weight);
}

void launch_correct(const LossArguments& arguments, float* sequence_ratio, float* kept, Stream stream) {
  if (arguments.sequences.count > 0)
    launch("correct_kernel", correct_kernel<kThreads>, arguments.sequences.count, kThreads, 0, stream, arguments,
           sequence_ratio, kept);
}

int64_t loss_partials(const LossArguments& arguments) {
  return arguments.batch.needs_sequence(arguments.config) ? arguments.sequences.count
                                                          : blocks_of(arguments.batch.tokens);
}

void launch_token_loss(const LossArguments& arguments, LossSums* partials, const LossOutputs& out, Stream stream) {
  const int64_t blocks = loss_partials(arguments);
  if (!arguments.batch.needs_sequence(arguments.config))
    launch("token_kernel", token_kernel<kThreads>, blocks, kThreads, 0, stream, arguments, partials);
  else if (blocks > 0)
    launch("sequence_kernel", sequence_kernel<kThreads>, blocks, kThreads, 0, stream, arguments, partials);
  launch("finish_loss_kernel", finish_loss_kernel<kThreads>, 1, kThreads, 0, stream,
         static_cast<const LossSums*>(partials), blocks, out);
}

}  // namespace longgrpo
