// Rows of logits, a block a row.
//
//   sweep 1, forward   t_j -> highest, sum, weighted      logp, entropy, and from them the loss's gradient (c, e, kl)
//   sweep 2, backward  signed_j = [j = y] - p_j / (1 - p_y), the row's scale being c (1 - p_y) = -c expm1(logp);
//                      with an entropy gradient or an exact KL their terms join, and the scale is max(|c|, |e|, |kl|)
//
// The scale takes what is small for a confident token or a large normalizer, so the signed row is near 1 in any dtype:
// its target's entry is exactly 1, and fp16 meets no subnormal numbers.
//
// The tile is read from memory once: sweep 2 meets first what sweep 1 read last, which is still in L2, and the first
// columns, read longest ago, were kept in shared memory. Each thread reads back in sweep 2 the columns it read in sweep
// 1, so shared memory is as private as registers and needs no barrier.
//
// Bytes a row: 4 V read, and 4 V or 2 V written. Work a column: 2 exponentials (ex2) and, in sm_90a's machine code,
// about 20 + 10 instructions, three quarters of what a multiprocessor issues while its share of the memory moves the
// column.
#pragma once

#include "device.h"
#include "launch.h"
#include "softmax.cuh"

namespace longgrpo {

constexpr int kWidth = 4;  // columns of one 16-byte load

// What the formulas of math/row.h take for exp and tanh.
struct CudaMath {
  DEVICE static float exp(float x) { return expf(x); }
  DEVICE static float tanh(float x) { return tanhf(x); }
};

// The transform of the logits, with the rest as one factor: z_j = factor x'_j.
template <bool kShaped>
struct Logits {
  const float* bias;
  float scale, cap, inverse_cap, factor;
  int columns;

  DEVICE Logits(const LogitTransform& t, float temperature, int first_column, int columns)
      : bias(t.bias ? t.bias + first_column : nullptr),
        scale(t.logit_scale),
        cap(t.softcap),
        inverse_cap(t.softcap > 0 ? 1.0f / t.softcap : 0.0f),
        factor((kShaped ? 1.0f : t.logit_scale) / temperature),
        columns(columns) {}

  DEVICE float factor2() const { return factor * kLog2E; }

  DEVICE float operator()(float x, int column) const {
    if constexpr (!kShaped) return x;
    const float y = scaled_logit(x, bias && column < columns ? bias[column] : 0.0f, scale);
    return cap > 0 ? capped_logit<CudaMath>(y, cap, inverse_cap) : y;
  }
  // d x'/d logit, without the scale
  DEVICE float slope(float shaped) const {
    if constexpr (!kShaped) return 1.0f;
    return cap_slope(shaped, inverse_cap);
  }
};

// One row as its block reads it: in steps, of which each warp has a segment.
template <bool kShaped, int kThreads>
struct Row {
  static constexpr int kLoads = kSegment / (kWarp * kWidth), kStep = kThreads / kWarp * kSegment;
  using Values = float[kLoads][kWidth];

  const float* x;
  Logits<kShaped> logits;
  int columns;
  float* kept;  // shared memory for the first `kept_columns`, whole steps
  int kept_columns;

  // The first of this warp's columns in a step, and those of this thread.
  DEVICE static int segment(int step) { return step + int(threadIdx.x) / kWarp * kSegment; }
  DEVICE static int column(int step, int u) { return segment(step) + (u * kWarp + int(threadIdx.x) % kWarp) * kWidth; }

  // Transformed logits of this thread in a step; -inf past the last column.
  DEVICE void read(int step, Values& to) const {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int j = column(step, u);
      if (j < columns) {
        load4(x + j, to[u]);
      } else {
        to[u][0] = to[u][1] = to[u][2] = to[u][3] = -INFINITY;
      }
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int j = column(step, u);
      if constexpr (kShaped) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) to[u][k] = logits(to[u][k], j + k);
      }
      if (j + kWidth > columns) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          if (j + k >= columns) to[u][k] = -INFINITY;
      }
    }
  }

  // The target's column adds nothing to sums.
  DEVICE static void leave_out(int target, int step, Values& values) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const unsigned hit = unsigned(target - column(step, u));
      if (hit < kWidth) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          if (hit == unsigned(k)) values[u][k] = -INFINITY;
      }
    }
  }

  // The highest logit of this warp's segment.
  DEVICE static float highest(const Values& values) {
    float top = values[0][0];
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
#pragma unroll
      for (int k = 0; k < kWidth; ++k) top = fmaxf(top, values[u][k]);
    return warp_reduce<kWarp>(Highest{top}).value;
  }

  // The segment's sums, written to `parts`; its logits become 2^t_j relative to `top`.
  DEVICE void sum_segment(int step, float top, Values& values, PartSums* parts) const {
    const float factor2 = logits.factor2();
    PartSums part{top, 0, 0};
    const float origin = part.origin();
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float t = exponent(values[u][k], origin, factor2), e = exp2_fast(t);
        part.sum += e;
        part.weighted = fmaf(e, fmaxf(t, kLowestExponent), part.weighted);
        values[u][k] = e;
      }
    const TwoSums sums = warp_reduce<kWarp>(TwoSums{part.sum, part.weighted});
    if (threadIdx.x % kWarp == 0 && segment(step) < columns)
      parts[segment(step) / kSegment] = {top, sums.first, sums.second};
  }

  // The softmax's sums over all columns but the target. parts [segments of a row]: shared memory.
  DEVICE PartSums sum(int target, PartSums* parts) const {
    __syncthreads();  // the readers of an earlier sum are done
    for (int step = 0; step < columns; step += kStep) {
      Values values;
      read(step, values);
      if (step < kept_columns) {
#pragma unroll
        for (int u = 0; u < kLoads; ++u) store4(kept + column(step, u), values[u]);
      }
      leave_out(target, step, values);
      sum_segment(step, highest(values), values, parts);
    }
    __syncthreads();
    return fold(parts, (columns + kSegment - 1) / kSegment, logits.factor2());
  }

  // to[j] = f(x'_j, j), from the last step to the first; `to` may lie in the second half of the row's own memory.
  template <class Out, class F>
  DEVICE void rewrite(Out* to, F&& f) const {
    const int last = (columns - 1) / kStep * kStep;
    for (int step = last; step >= 0; step -= kStep) {
      Values values;
      if (step < kept_columns) {
#pragma unroll
        for (int u = 0; u < kLoads; ++u) load4(kept + column(step, u), values[u]);
      } else {
        read(step, values);
      }
      if constexpr (sizeof(Out) != sizeof(float)) __syncthreads();  // others may still read where this thread writes
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int j = column(step, u);
        if (j >= columns) continue;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[u][k] = f(values[u][k], j + k);
        store4(to + j, values[u]);
      }
    }
  }

  // to[j] *= factor in the columns of this thread in a step that it has written.
  template <class Out>
  DEVICE void scale_written(Out* to, int step, float factor) const {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int j = column(step, u);
      if (j >= columns) continue;
      float values[kWidth];
      load4(to + j, values);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] *= factor;
      store4(to + j, values);
    }
  }
};

// Where the signed row lies.
template <class Out>
DEVICE Out* signed_row(float* logits, int64_t stride) {
  return reinterpret_cast<Out*>(logits) + (sizeof(Out) == sizeof(float) ? 0 : stride);
}

// A row after its statistics: log p_j = ln2 t_j - softmax.offset.
struct Base2Statistics {
  float factor2, origin;  // t_j = factor2 (x'_j - origin)
  float rest;             // sum of 2^t_j over all columns but the target
  RowSoftmax softmax;

  DEVICE float exponent(float x) const { return longgrpo::exponent(x, origin, factor2); }
  DEVICE float logp(float x) const { return kLn2 * exponent(x) - softmax.offset; }
};

DEVICE Base2Statistics finish(const PartSums& rest, float factor2, float target_x) {
  Base2Statistics row{factor2, rest.origin(), rest.sum, {}};
  row.softmax = finish_row(rest.sums(), product(kLn2, row.exponent(target_x)));
  return row;
}

// Terms of the KL between a row and its reference.
struct KlTerms {
  Base2Statistics row, reference;
  bool reverse;

  // Both take x' of the row and of the reference.
  DEVICE float divergence(float x, float r) const {
    const float d = row.logp(x), d_reference = reference.logp(r);
    return divergence_term<CudaMath>(reverse ? d : d_reference, reverse ? d_reference : d);
  }
  DEVICE float gradient(float weight, float x, float r, float divergence) const {
    const float d = row.logp(x), d_reference = reference.logp(r);
    return reverse ? reverse_kl_gradient<CudaMath>(weight, d, d_reference, divergence)
                   : forward_kl_gradient<CudaMath>(weight, d, d_reference);
  }
};

template <int kThreads, class BlockRow>
DEVICE float exact_kl(const BlockRow& row, const BlockRow& reference, const KlTerms& terms) {
  Sum sum{0};
  for (int step = 0; step < row.columns; step += BlockRow::kStep) {
    typename BlockRow::Values x, r;
    row.read(step, x);
    reference.read(step, r);
#pragma unroll
    for (int u = 0; u < BlockRow::kLoads; ++u) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        if (BlockRow::column(step, u) + k < row.columns) sum.value += terms.divergence(x[u][k], r[u][k]);
    }
  }
  return block_reduce<kThreads>(sum).value;
}

// kBeyond: a gradient other than logp's, that of the entropy or of the exact KL, is possible. Beside a bias or a soft
// cap it needs more than the 64 registers that kRowThreads a multiprocessor leave to a thread: there half of them have
// to do.
template <class Out, bool kShaped, bool kBeyond, int kThreads>
KERNEL(kThreads, kRowThreads / (kShaped && kBeyond ? 2 : 1) / kThreads)
row_kernel(RowTile tile, RowOutputs out, int kept_columns) {
  DYNAMIC_SHARED(float, kept);  // then the sums of the segments
  PartSums* const parts = reinterpret_cast<PartSums*>(kept + kept_columns);
  SHARED(RowGradient, shared_gradient);
  const int64_t i = blockIdx.x, token = tile.first + i;
  const int columns = int(tile.transform.vocabulary);
  float* const x = tile.logits + i * tile.stride;
  Out* const to = signed_row<Out>(x, tile.stride);
  const float temperature = tile.temperature_of(token);
  using BlockRow = Row<kShaped, kThreads>;
  const BlockRow row{x, {tile.transform, temperature, 0, columns}, columns, kept, kept_columns};

  if (tile.skips(token)) {
    if (!out.row_scale) return;
    if (threadIdx.x == 0) out.row_scale[i] = 0;
    row.rewrite(to, [](float, int) { return 0.0f; });
    return;
  }

  const int target = int(tile.target[token] < columns ? tile.target[token] : 0);
  const float target_x = row.logits(x[target], target);
  Base2Statistics statistics = finish(row.sum(target, parts), row.logits.factor2(), target_x);
  if (tile.target[token] >= columns) statistics.softmax.logp = NAN;  // no way to raise an error from here
  const float logp = statistics.softmax.logp, entropy = statistics.softmax.entropy;

  BlockRow reference = row;
  KlTerms terms{};
  float divergence = 0;
  if constexpr (kBeyond) {
    if (tile.reference_logits) {
      reference.x = tile.reference_logits + i * tile.stride;
      reference.kept_columns = 0;
      const float reference_target = row.logits(reference.x[target], target);
      terms = {statistics, finish(reference.sum(target, parts), row.logits.factor2(), reference_target),
               tile.exact_kl == ExactKl::reverse};
      divergence = exact_kl<kThreads>(row, reference, terms);
    }
  }

  if (threadIdx.x == 0) {
    if (out.logp) out.logp[token] = logp;
    if (out.entropy) out.entropy[token] = entropy;
    if (out.kl) out.kl[token] = divergence;
    if (out.row_scale) shared_gradient = tile.loss(token, logp);
  }
  if (!out.row_scale) return;
  __syncthreads();

  const RowGradient whole = shared_gradient;
  // p_j / (1 - p_y) is the row's softmax without the target.
  const float scale = whole.scale() * (kBeyond ? 1.0f : -expm1f(logp));
  if (threadIdx.x == 0) {
    out.row_scale[i] = scale;
    if (out.scale) out.scale[token] = scale;
  }
  if (scale == 0) {
    row.rewrite(to, [](float, int) { return 0.0f; });
    return;
  }
  const float to_logits = tile.transform.logit_scale / temperature;

  if constexpr (kBeyond) {
    const RowGradient g = whole.over(scale);
    row.rewrite(to, [&](float value, int j) {
      float dz = logit_gradient<CudaMath>(g, statistics.logp(value), entropy);
      if (j == target) dz = target_logit_gradient(g, logp, entropy);
      if (tile.reference_logits && j < columns)
        dz += terms.gradient(g.kl, value, row.logits(reference.x[j], j), divergence);
      return to_logits * dz * row.logits.slope(value);
    });
  } else {
    const float of_target = to_logits * (whole.logp / fabsf(whole.logp)), factor = -of_target / statistics.rest;
    row.rewrite(
        to, [&](float value, int) { return factor * exp2_fast(statistics.exponent(value)) * row.logits.slope(value); });
    __syncthreads();
    if (threadIdx.x == 0) round_to(of_target * row.logits.slope(target_x), to[target]);
  }
}

}  // namespace longgrpo
