// The sweeps of head/sweeps.h as kernels: a thread a token, or a block a sequence if c needs the whole sequence. Sums
// are double, each in one fixed order: partial sums of blocks first, then one block over the partials.
#pragma once

#include "device.h"
#include "launch.h"
#include "softmax.cuh"

namespace longgrpo {

// The team of head/sweeps.h.
template <int kThreads>
struct Block {
  DEVICE int64_t first() const { return threadIdx.x; }
  DEVICE int64_t step() const { return kThreads; }
  template <class T>
  DEVICE T reduce(const T& mine) const {
    return block_reduce<kThreads>(mine);
  }
};

// f(t) for the tokens that a thread of the grid has.
template <int kThreads, class F>
DEVICE void each_token(int64_t tokens, F&& f) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x; t < tokens; t += step) f(t);
}

template <int kThreads>
KERNEL(kThreads)
visited_tokens_kernel(Visits visits, float* weight) {
  each_token<kThreads>(visits.batch.tokens, [&](int64_t t) { weight[t] = visits.weight(t, visits.moves(t)); });
}

template <int kThreads>
KERNEL(kThreads)
visited_sequences_kernel(Visits visits, float* weight) {
  const int64_t begin = visits.sequences.bounds[blockIdx.x], end = visits.sequences.bounds[blockIdx.x + 1];
  const bool moves = visits.sequence_moves(Block<kThreads>{}, begin, end);
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) weight[t] = visits.weight(t, moves);
}

template <int kThreads>
KERNEL(kThreads)
correct_kernel(LossArguments a, float* sequence_ratio, float* kept) {
  const int64_t begin = a.sequences.bounds[blockIdx.x], end = a.sequences.bounds[blockIdx.x + 1];
  a.correct(Block<kThreads>{}, sequence_ratio, kept, begin, end);
}

template <int kThreads>
KERNEL(kThreads)
token_kernel(LossArguments a, LossSums* partials) {
  LossSums sums;
  each_token<kThreads>(a.batch.tokens, [&](int64_t t) { a.token(sums, t); });
  sums = block_reduce<kThreads>(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = sums;
}

template <int kThreads>
KERNEL(kThreads)
sequence_kernel(LossArguments a, LossSums* partials) {
  LossSums sums;
  a.sequence(Block<kThreads>{}, sums, a.sequences.bounds[blockIdx.x], a.sequences.bounds[blockIdx.x + 1]);
  sums = block_reduce<kThreads>(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = sums;
}

// One block.
template <int kThreads>
KERNEL(kThreads)
finish_loss_kernel(const LossSums* partials, int64_t n, LossOutputs out) {
  LossSums sums;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sums.merge(partials[i]);
  sums = block_reduce<kThreads>(sums);
  if (threadIdx.x != 0) return;
  *out.loss = sums.loss();
  *out.metrics = sums.metrics();
}

}  // namespace longgrpo
