// The loss from logp: value, metrics and c = dL/d(logp), a thread a token, or a block a sequence where c needs the
// whole sequence. Sums are double, each in one fixed order: partial sums of blocks first, then one block over the
// partials.
#pragma once

#include "device.h"
#include "launch.h"
#include "softmax.cuh"

namespace longgrpo {

struct LossArguments {
  LossConfig config;
  TokenBatch batch;
  const float* logp;
  const float* entropy;   // or null
  const float* exact_kl;  // or null
  const int32_t* cu_seqlens;
  float* logp_gradient;
  LossSums* partials;

  DEVICE void finish_token(LossSums& sums, int64_t t, const Token& token, const TokenTerm& term, float c) const {
    logp_gradient[t] = c;
    sums.add(config, term, token, batch.weight[t], exact_kl ? exact_kl[t] : term.kl, entropy ? entropy[t] : 0.0f, c);
  }
};

template <int kThreads>
KERNEL(kThreads)
token_kernel(LossArguments a) {
  LossSums sums;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x; t < a.batch.tokens; t += step) {
    const float weight = a.batch.weight[t];
    if (weight == 0) {
      a.logp_gradient[t] = 0;
      continue;
    }
    const Token token = a.batch.at(t, a.logp[t]);
    const TokenTerm term = token_term(a.config, token);
    a.finish_token(sums, t, token, term, logp_gradient(a.config, term, token, weight));
  }
  sums = block_reduce<kThreads>(sums);
  if (threadIdx.x == 0) a.partials[blockIdx.x] = sums;
}

struct MergedSequence : SequenceSums {
  DEVICE void merge(const MergedSequence& other) {
    count += other.count, log_ratio += other.log_ratio;
    clipped_log_ratio += other.clipped_log_ratio, log_importance += other.log_importance;
  }
};

struct DoubleSum {
  double value;
  DEVICE void merge(DoubleSum other) { value += other.value; }
};

// Three sweeps over the tokens of a sequence: its ratio, what its tokens share, every token's gradient.
template <int kThreads>
KERNEL(kThreads)
sequence_kernel(LossArguments a) {
  const int64_t begin = a.cu_seqlens[blockIdx.x], end = a.cu_seqlens[blockIdx.x + 1];
  const auto tokens = [&](auto&& f) {
    for (int64_t t = begin + threadIdx.x; t < end; t += kThreads)
      if (a.batch.weight[t] != 0) f(t, a.batch.at(t, a.logp[t]));
  };

  MergedSequence own;
  tokens([&](int64_t, const Token& token) { own.add(a.config, token); });
  const Sequence sequence = finish_sequence(a.config, block_reduce<kThreads>(own));

  DoubleSum shared{0};
  tokens([&](int64_t t, const Token& token) {
    const SequenceTerm term = sequence_term(a.config, token, sequence);
    shared.value +=
        double(a.batch.weight[t]) * (policy_part(a.config, token, term.shared_policy) + a.config.beta * term.shared_kl);
  });
  const float share = float(block_reduce<kThreads>(shared).value / sequence.count);

  LossSums sums;
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads)
    if (a.batch.weight[t] == 0) a.logp_gradient[t] = 0;
  tokens([&](int64_t t, const Token& token) {
    const SequenceTerm term = sequence_term(a.config, token, sequence);
    const float direct = logp_gradient(a.config, term.token, token, a.batch.weight[t]);
    a.finish_token(sums, t, token, term.token, direct + (term.follows ? share : 0.0f));
  });
  sums = block_reduce<kThreads>(sums);
  if (threadIdx.x == 0) a.partials[blockIdx.x] = sums;
}

// One block.
template <int kThreads>
KERNEL(kThreads)
finish_loss_kernel(const LossSums* partials, int64_t n, float* loss, LossMetrics* metrics) {
  LossSums sums;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sums.merge(partials[i]);
  sums = block_reduce<kThreads>(sums);
  if (threadIdx.x != 0) return;
  *loss = sums.loss();
  *metrics = sums.metrics();
}

struct VisitArguments {
  LossConfig config;
  TokenBatch batch;
  const int64_t* target;  // or null
  const int32_t* cu_seqlens;
  bool report;
  float* visited;

  DEVICE bool in_loss(int64_t t) const { return batch.weight[t] != 0 && (!target || target[t] >= 0); }
};

template <int kThreads>
KERNEL(kThreads)
visited_tokens_kernel(VisitArguments a) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x; t < a.batch.tokens; t += step)
    a.visited[t] = a.in_loss(t) && (a.report || a.batch.moves(a.config, t)) ? a.batch.weight[t] : 0.0f;
}

struct Any {
  int value;
  DEVICE void merge(Any other) { value |= other.value; }
};

// One token's advantage can move every token of its sequence.
template <int kThreads>
KERNEL(kThreads)
visited_sequences_kernel(VisitArguments a) {
  const int64_t begin = a.cu_seqlens[blockIdx.x], end = a.cu_seqlens[blockIdx.x + 1];
  Any any{a.report};
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) any.value |= a.in_loss(t) && a.batch.moves(a.config, t);
  any = block_reduce<kThreads>(any);
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads)
    a.visited[t] = any.value && a.in_loss(t) ? a.batch.weight[t] : 0.0f;
}

}  // namespace longgrpo
