// Rows in chunks of the vocabulary, with the target's column left out of every sum and added at the end.
//
//   chunk     sums of each segment      E_j = 2^(factor2 (x_j - reference)) (1 - tanh_j^2),  E_target = 0
//   GEMM      sums += E W_chunk
//   finish    direction = (s / tau) ((1 - p_y)(1 - tanh_y^2) w_y - e^-rest sums),   1 - p_y = -expm1(logp)
//
// One sweep: the reference is fixed before a column is read. It is the highest logit of the row's first step, and moves
// only if a later E_j would pass 2^kRoom, which is seen before it is written: then what was written and the row's sums
// are scaled to the new one. Most rows never meet that. 2^kRoom is what fp16 holds.
//
// E_j is rounded relative to itself; w_y meets its exact fp32 factor. So a confident token keeps its small gradient to
// three digits, where w_y - bf16(p) W loses it.

#pragma once

#include "rows.cuh"

namespace longgrpo {

constexpr float kRoom = 15;

// The factor that takes terms from the reference `from` to the reference `to`; there are none under -inf.
DEVICE float rescaled(float from, float to, float factor2) {
  return from == -INFINITY ? 0.0f : exp2_fast(exponent(from, to, factor2));
}

// x[j] *= factor, `n` numbers of a block.
template <int kThreads>
DEVICE void scale_numbers(float* x, float factor, int64_t n) {
  for (int64_t j = threadIdx.x; j < n; j += kThreads) x[j] *= factor;
}

template <class Out, bool kShaped, bool kGradient, int kThreads>
KERNEL(kThreads, kRowThreads / kThreads)
chunk_kernel(RowTile tile, int64_t first_column, int columns, Chunks chunks) {
  using BlockRow = Row<kShaped, kThreads>;
  const int64_t i = blockIdx.x, token = tile.first + i;
  float* const x = tile.logits + i * tile.stride;
  Out* const to = signed_row<Out>(x, tile.stride);
  const BlockRow row{x, {tile.transform, tile.temperature_of(token), int(first_column), columns}, columns, nullptr, 0};
  if (tile.skips(token)) {
    if (kGradient) row.rewrite(to, [](float, int) { return 0.0f; });
    return;
  }
  PartSums* const parts = chunks.parts + i * chunks.segments + chunks.before;
  const int64_t hit = tile.target[token] - first_column;
  const int target = hit >= 0 && hit < columns ? int(hit) : -1;
  if (threadIdx.x == 0 && target >= 0) chunks.state[i].target_x = row.logits(x[target], target);

  const float factor2 = row.logits.factor2();
  const float before = kGradient && first_column > 0 ? chunks.state[i].reference : -INFINITY;
  float reference = before;
  const int last = (columns - 1) / BlockRow::kStep * BlockRow::kStep;
  // From the last step to the first: E, in the second half of the row's memory, overwrites only what has been read.
  for (int step = last; step >= 0; step -= BlockRow::kStep) {
    typename BlockRow::Values values, slopes;
    row.read(step, values);
    if constexpr (kShaped && kGradient) {
#pragma unroll
      for (int u = 0; u < BlockRow::kLoads; ++u)
#pragma unroll
        for (int k = 0; k < kWidth; ++k) slopes[u][k] = row.logits.slope(values[u][k]);
    }
    BlockRow::leave_out(target, step, values);
    const float top = BlockRow::highest(values);
    if constexpr (kGradient) {
      // The barrier is for those who read where this thread is about to write, too.
      if (__syncthreads_or(exponent(top, reference, factor2) > kRoom)) {
        const float higher = block_reduce<kThreads>(Highest{top}).value;
        const float factor = rescaled(reference, higher, factor2);
        for (int done = step + BlockRow::kStep; done <= last; done += BlockRow::kStep)
          row.scale_written(to, done, factor);
        reference = higher;
      }
    }
    row.sum_segment(step, top, values, parts);
    if constexpr (kGradient) {
      const float factor = rescaled(top, reference, factor2);
#pragma unroll
      for (int u = 0; u < BlockRow::kLoads; ++u) {
        const int j = BlockRow::column(step, u);
        if (j >= columns) continue;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[u][k] *= kShaped ? factor * slopes[u][k] : factor;
        store4(to + j, values[u]);
      }
    }
  }
  if constexpr (kGradient) {
    if (threadIdx.x == 0) chunks.state[i].reference = reference;
    if (before != -INFINITY && before != reference)
      scale_numbers<kThreads>(chunks.sums + i * chunks.hidden, rescaled(before, reference, factor2), chunks.hidden);
  }
}

template <class Weight, class Out, bool kShaped, int kThreads>
KERNEL(kThreads)
finish_kernel(RowTile tile, RowOutputs out, Chunks chunks, const Weight* weight, Out* direction) {
  const int64_t i = blockIdx.x, token = tile.first + i, hidden = chunks.hidden;
  Out* const to = direction + token * hidden;
  if (tile.skips(token)) {
    if (chunks.sums)
      for (int64_t j = threadIdx.x; j < hidden; j += kThreads) round_to(0.0f, to[j]);
    return;
  }
  const ChunkState state = chunks.state[i];
  const float temperature = tile.temperature_of(token);
  const Logits<kShaped> logits(tile.transform, temperature, 0, int(tile.transform.vocabulary));
  const float factor2 = logits.factor2();
  const PartSums rest = fold(chunks.parts + i * chunks.segments, int(chunks.segments), factor2);
  const int64_t target = tile.target[token];
  const bool inside = target < tile.transform.vocabulary;
  Base2Statistics row = finish(rest, factor2, inside ? state.target_x : 0.0f);
  if (!inside) row.softmax.logp = NAN;  // no way to raise an error from here
  // 0 if only the target is possible: exp(-offset) may be infinite then, and meets sums of 0.
  const float inverse = rest.sum == 0 ? 0.0f : expf(-row.softmax.offset);
  if (threadIdx.x == 0) {
    if (out.logp) out.logp[token] = row.softmax.logp;
    if (out.entropy) out.entropy[token] = row.softmax.entropy;
    if (out.scale) out.scale[token] = tile.loss(token, row.softmax.logp).logp;
    if (out.normalizer) out.normalizer[token] = {row.origin, inverse};
  }
  if (!chunks.sums) return;
  // Where nobody takes the scale, the direction is dL/dhidden itself.
  const float c = out.scale ? 1.0f : tile.loss(token, row.softmax.logp).logp;
  const float to_logits = c * tile.transform.logit_scale / temperature;
  const float of_target = -to_logits * expm1f(row.softmax.logp) * logits.slope(state.target_x);
  const float of_rest = -to_logits * inverse * rescaled(state.reference, row.origin, factor2);
  const Weight* const w = weight + (inside ? target : 0) * hidden;
  for (int64_t j = threadIdx.x; j < hidden; j += kThreads)
    round_to(fmaf(of_target, widen(w[j]), of_rest * chunks.sums[i * hidden + j]), to[j]);
}

// dL/d(logit) = c (s / tau) (1[j = y] - p_j) (1 - tanh_j^2)
template <class Out, bool kShaped, int kThreads>
KERNEL(kThreads, kRowThreads / kThreads)
weight_rows_kernel(RowTile tile, int64_t first_column, int columns, const float* c, const float* logp,
                   const RowNormalizer* normalizers) {
  const int64_t i = blockIdx.x, token = tile.first + i;
  float* const x = tile.logits + i * tile.stride;
  Out* const to = signed_row<Out>(x, tile.stride);
  const float temperature = tile.temperature_of(token);
  const Row<kShaped, kThreads> row{x, {tile.transform, temperature, int(first_column), columns}, columns, nullptr, 0};
  if (c[token] == 0 || tile.target[token] < 0) return row.rewrite(to, [](float, int) { return 0.0f; });
  const RowNormalizer normalizer = normalizers[token];
  const float to_logits = c[token] * tile.transform.logit_scale / temperature;
  const float of_target = -to_logits * expm1f(logp[token]), of_rest = -to_logits * normalizer.inverse;
  const float factor2 = row.logits.factor2();
  const int64_t target = tile.target[token] - first_column;
  row.rewrite(to, [&](float value, int j) {
    const float dz = j == target ? of_target : of_rest * exp2_fast(exponent(value, normalizer.highest, factor2));
    return dz * row.logits.slope(value);
  });
}

}  // namespace longgrpo
