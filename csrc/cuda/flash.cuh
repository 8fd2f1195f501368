// Rows in chunks of the vocabulary, for a head that is not trained: the running maximum of FlashAttention, with the
// target's column left out of every sum and added at the end.
//
//   chunk     state <- online softmax over the chunk      E_j = 2^t_j (1 - tanh_j^2),  E_target = 0
//   GEMM      product = E W_chunk                         sums <- rescale sums + product
//   finish    direction = (s / tau) ((1 - p_y)(1 - tanh_y^2) w_y - e^-rest sums),   1 - p_y = -expm1(logp)
//
// Every E_j is at most 1 and its rounding is relative to itself; w_y meets its exact fp32 factor. So a confident token
// keeps its small gradient to three digits, where w_y - bf16(p) W loses it.
#pragma once

#include "rows.cuh"

namespace longgrpo {

DEVICE OnlineSoftmax softmax_of(const ChunkState& state, float factor2) {
  OnlineSoftmax softmax(factor2);
  softmax.highest = state.highest, softmax.sum = state.sum, softmax.weighted = state.weighted;
  return softmax;
}

template <class Out, bool kShaped, bool kGradient, int kThreads>
KERNEL(kThreads)
chunk_kernel(RowTile tile, int64_t first_column, int columns, ChunkState* states) {
  SHARED(ChunkState, shared_state);
  const int64_t i = blockIdx.x, token = tile.first + i;
  float* const x = tile.logits + i * tile.stride;
  Out* const to = signed_row<Out>(x, tile.stride);
  const Row<kShaped, kThreads, 4> row{
      x, {tile.transform, tile.temperature_of(token), int(first_column), columns}, columns, nullptr, 0};

  if (tile.skips(token)) {
    if (threadIdx.x == 0) states[i] = {-INFINITY, 0, 0, 0, 0};  // sums start again from nothing: never a NaN
    if (kGradient) row.rewrite(to, [](float, int) { return 0.0f; });
    return;
  }
  const int64_t hit = tile.target[token] - first_column;
  const int target = hit >= 0 && hit < columns ? int(hit) : -1;
  float target_x = 0;
  if (target >= 0) target_x = row.logits(x[target], target);
  const OnlineSoftmax chunk = row.sum(target);
  if (threadIdx.x == 0) {
    ChunkState state = first_column > 0 ? states[i] : ChunkState{-INFINITY, 0, 0, 0, 0};
    OnlineSoftmax whole = softmax_of(state, row.logits.factor2());
    whole.merge(chunk);
    const float rescale = state.sum == 0 ? 0.0f : exp2_fast(whole.exponent(state.highest, whole.origin()));
    states[i] =
        shared_state = {whole.highest, whole.sum, whole.weighted, target >= 0 ? target_x : state.target_x, rescale};
  }
  if (!kGradient) return;
  __syncthreads();
  const OnlineSoftmax whole = softmax_of(shared_state, row.logits.factor2());
  const float origin = whole.origin();
  row.rewrite(to, [&](float value, int) { return exp2_fast(whole.exponent(value, origin)) * row.logits.slope(value); });
  __syncthreads();
  if (threadIdx.x == 0 && target >= 0) round_to(0.0f, to[target]);
}

template <class Weight, class Out, bool kShaped, int kThreads>
KERNEL(kThreads)
finish_kernel(RowTile tile, RowOutputs out, const ChunkState* states, const float* sums, const Weight* weight,
              Out* direction, int64_t hidden) {
  const int64_t i = blockIdx.x, token = tile.first + i;
  Out* const to = direction + token * hidden;
  if (tile.skips(token)) {
    if (sums)
      for (int64_t j = threadIdx.x; j < hidden; j += kThreads) round_to(0.0f, to[j]);
    return;
  }
  const ChunkState state = states[i];
  const float temperature = tile.temperature_of(token);
  const Logits<kShaped> logits(tile.transform, temperature, 0, int(tile.transform.vocabulary));
  Base2Statistics row = finish(softmax_of(state, logits.factor2()), state.target_x);
  const int64_t target = tile.target[token];
  const bool inside = target < tile.transform.vocabulary;
  if (!inside) row.softmax.logp = NAN;
  if (threadIdx.x == 0) {
    if (out.logp) out.logp[token] = row.softmax.logp;
    if (out.entropy) out.entropy[token] = row.softmax.entropy;
    if (out.scale) out.scale[token] = tile.loss(token, row.softmax.logp).logp;
  }
  if (!sums) return;
  // Where nobody takes the scale, the direction is dL/dhidden itself.
  const float c = out.scale ? 1.0f : tile.loss(token, row.softmax.logp).logp;
  const float to_logits = c * tile.transform.logit_scale / temperature;
  const float of_target = -to_logits * expm1f(row.softmax.logp) * logits.slope(state.target_x);
  const float of_rest = -to_logits * expf(-row.softmax.offset);
  const Weight* const w = weight + (inside ? target : 0) * hidden;
  for (int64_t j = threadIdx.x; j < hidden; j += kThreads)
    round_to(fmaf(of_target, widen(w[j]), of_rest * sums[i * hidden + j]), to[j]);
}

// A block a row, as many numbers at a time as the row's alignment allows.
template <int kThreads>
KERNEL(kThreads)
rescale_add_kernel(float* sums, const float* product, const ChunkState* states, int64_t hidden) {
  const float rescale = states[blockIdx.x].rescale;
  float* const to = sums + blockIdx.x * hidden;
  const float* const from = product + blockIdx.x * hidden;
  if (hidden % kWidth != 0) {
    for (int64_t j = threadIdx.x; j < hidden; j += kThreads) to[j] = fmaf(rescale, to[j], from[j]);
    return;
  }
  for (int64_t j = threadIdx.x * int64_t(kWidth); j < hidden; j += kThreads * kWidth) {
    float a[kWidth], b[kWidth];
    load4(to + j, a);
    load4(from + j, b);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) a[k] = fmaf(rescale, a[k], b[k]);
    store4(to + j, a);
  }
}

}  // namespace longgrpo
