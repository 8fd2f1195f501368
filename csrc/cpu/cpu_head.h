// The head on the CPU: head_pass.h's Device, and fused_loss.h's. Runtime lends memory, the GEMM and the threads:
// torch's in the extension, BLAS and OpenMP in the benchmark binary.
//   runtime.gemm(a, b, c)                 c = a b, fp32, any strides
//   runtime.parallel_for(n, f)            f(i) for i in [0, n)
//   runtime.threads()
//   runtime.chosen_rows(head)             rows of a tile if they were chosen (tile_choice.h), else 0
//   auto memory = runtime.scratch(bytes)  memory.data(), freed with `memory`
#pragma once

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../head/head_pass.h"
#include "../head/tile_choice.h"
#include "convert.h"
#include "gemm_bf16.h"
#include "rows.h"
#include "sweeps.h"

namespace longgrpo {

struct Matrix {
  float* data;
  int64_t rows, columns, row_stride, column_stride;
};

inline Matrix row_major(float* data, int64_t rows, int64_t columns, int64_t stride) {
  return {data, rows, columns, stride, 1};
}
inline Matrix transposed(const Matrix& m) { return {m.data, m.columns, m.rows, m.column_stride, m.row_stride}; }

constexpr int64_t kLine = 64;  // bytes of a cache line
inline float* aligned(float* x) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(x) + kLine - 1) & ~uintptr_t{kLine - 1});
}

// Whether the GEMMs run on the bf16 operands as they are; otherwise they are upcast, block by block.
inline bool native_bf16(const HeadInputs& in) {
  return in.hidden_dtype == Dtype::bf16 && in.weight_dtype == Dtype::bf16 && bf16::supported();
}

// Vocabulary rows whose fp32 copy or gradient is staged at once.
inline int64_t weight_chunk(const HeadShape& shape) { return std::min<int64_t>(shape.vocabulary, 4096); }

inline int64_t staging_bytes(const HeadShape& shape, const HeadInputs& in, bool weight_gradient, int64_t threads) {
  constexpr int64_t alignment = 2 * kLine;  // of the logits and of what is staged
  if (native_bf16(in)) return alignment + bf16::workspace_bytes(threads);
  const bool staged = in.weight_dtype != Dtype::f32 || weight_gradient;
  return alignment + (staged ? 4 * weight_chunk(shape) * shape.hidden : 0);
}

// The tiles of a pass over so many rows, of which the first `active` may have a gradient. chosen_rows: of a tile, where
// they fit into the limit; 0: as many as do.
inline HeadPlan plan_cpu(const HeadShape& shape, const HeadInputs& in, int64_t rows, int64_t active,
                         bool hidden_gradient, bool weight_gradient, bool reference, int64_t threads,
                         int64_t limit_bytes, int64_t chosen_rows = 0) {
  const HeadPlan plan{
      rows, active, 0, staging_bytes(shape, in, weight_gradient, threads), hidden_gradient, weight_gradient, reference};
  HeadPlan tiles = plan_tiles(plan, shape, limit_bytes);
  if (chosen_rows > 0) tiles.tile_rows = std::min(tiles.tile_rows, chosen_rows);
  return tiles;
}

// f(first vocabulary row, rows, fp32 [rows, hidden], whether it is the first chunk); `staged` holds an upcast chunk.
template <class Runtime, class F>
void weight_chunks(Runtime& runtime, const HeadShape& shape, const HeadInputs& in, const void* weight, float* staged,
                   F&& f) {
  if (in.weight_dtype == Dtype::f32)
    return f(0, shape.vocabulary, const_cast<float*>(static_cast<const float*>(weight)), true);
  const int64_t h = shape.hidden;
  for (int64_t j = 0; j < shape.vocabulary; j += weight_chunk(shape)) {
    const int64_t n = std::min(weight_chunk(shape), shape.vocabulary - j);
    runtime.parallel_for(n, [&](int64_t i) {
      to_float(static_cast<const char*>(weight) + (j + i) * h * size_of(in.weight_dtype), in.weight_dtype,
               staged + i * h, h);
    });
    f(j, n, staged, j == 0);
  }
}

// The logits of `rows` hidden states, row i of which lies at source(i); at least kMinTileRows rows of `logits`, stride
// apart, are written. tile: room for as many hidden states; staged: staging_bytes.
template <class Runtime, class Source>
void tile_logits(Runtime& runtime, const HeadShape& shape, const HeadInputs& in, const void* weight, int64_t rows,
                 Source&& source, float* tile, float* logits, int64_t stride, float* staged) {
  const int64_t h = shape.hidden, v = shape.vocabulary;
  if (native_bf16(in)) {
    uint16_t* gathered = reinterpret_cast<uint16_t*>(tile);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(gathered + i * h, source(i), size_t(h) * 2);
    bf16::gemm(runtime, {gathered, false, h, true, nullptr}, {weight, false, h, true, nullptr}, rows, v, h, false,
               logits, stride, staged);
    return;
  }
  const int64_t padded = std::max(rows, kMinTileRows);
  runtime.parallel_for(padded, [&](int64_t i) {
    float* to = tile + i * h;
    if (i >= rows) return std::fill(to, to + h, 0.0f);
    to_float(source(i), in.hidden_dtype, to, h);
  });
  weight_chunks(runtime, shape, in, weight, staged, [&](int64_t j, int64_t n, float* chunk, bool) {
    runtime.gemm(row_major(tile, padded, h, h), transposed(row_major(chunk, n, h, h)),
                 row_major(logits + j, padded, n, stride));
  });
}

template <class Runtime>
class CpuHead {
 public:
  // `rows` lists the tokens in the order of the pass.
  CpuHead(Runtime& runtime, const HeadShape& shape, const HeadPlan& plan, const HeadInputs& in, const HeadOutputs& out,
          const std::vector<int64_t>& rows, const RowLoss& loss, float* workspace)
      : runtime_(runtime),
        shape_(shape),
        plan_(plan),
        in_(in),
        out_(out),
        rows_(rows),
        loss_(loss),
        logits_kept_(loss.beyond_logp() || in.transform.softcap > 0 || plan.reference),
        bf16_(native_bf16(in)),
        stride_(logits_stride(shape)),
        slots_(size_t(plan.tile_rows)) {
    const int64_t tile = plan.tile_rows;
    logits_ = aligned(workspace);
    hidden_ = logits_ + tile * stride_;
    float* next = hidden_ + tile * shape.hidden;
    if (plan.hidden_gradient) direction_ = next, next += tile * shape.hidden;
    if (plan.reference) {
      reference_logits_ = next, next += tile * stride_;
      reference_hidden_ = next, next += tile * shape.hidden;
    }
    staged_ = aligned(next);
  }

  void logits(int64_t begin, int64_t rows) {
    first_logits(in_.hidden, in_.weight, begin, rows, hidden_, logits_);
    if (plan_.reference) {
      first_logits(in_.reference_hidden, in_.reference_weight, begin, rows, reference_hidden_, reference_logits_);
    }
  }

  int64_t rows(int64_t begin, int64_t rows, bool gradient) {
    runtime_.parallel_for(rows, [&](int64_t i) { slots_[i] = row(i, rows_[begin + i], gradient); });
    return gradient ? compact(rows) : 0;
  }

  // Whether any row had a gradient: dweight is written by the first such tile.
  bool dweight_begun() const { return dweight_begun_; }

  void hidden_gradient(int64_t rows) {
    const int64_t h = shape_.hidden, v = shape_.vocabulary;
    if (bf16_) {
      bf16::gemm(runtime_, {logits_, true, stride_, true, nullptr}, {in_.weight, false, h, false, nullptr}, rows, h, v,
                 false, direction_, h, staged_);
    } else {
      weight_chunks(runtime_, shape_, in_, in_.weight, staged_, [&](int64_t j, int64_t n, float* weight, bool first) {
        float* product = first ? direction_ : hidden_;  // torch's GEMM does not accumulate; the hidden tile is free now
        runtime_.gemm({logits_ + j, rows, n, stride_, 1}, row_major(weight, n, h, h), row_major(product, rows, h, h));
        if (!first) add(direction_, product, rows * h);
      });
    }
    runtime_.parallel_for(rows, [&](int64_t i) {
      char* to = static_cast<char*>(out_.direction) + slots_[i].token * h * size_of(in_.hidden_dtype);
      const float factor = out_.scale ? slots_[i].factor : slots_[i].factor * slots_[i].scale;
      from_float(direction_ + i * h, factor, to, in_.hidden_dtype, h);
    });
  }

  void weight_gradient(int64_t rows) {
    const int64_t h = shape_.hidden, v = shape_.vocabulary;
    std::vector<float> factors(size_t(rows), 0.0f);
    for (int64_t i = 0; i < rows; ++i) factors[size_t(i)] = slots_[i].scale * slots_[i].factor;
    if (out_.dweight && bf16_) {
      bf16::gemm(runtime_, {logits_, true, stride_, false, factors.data()}, {hidden_, false, h, false, nullptr}, v, h,
                 rows, dweight_begun_, dweight(), h, staged_);
    } else if (out_.dweight) {
      runtime_.parallel_for(
          rows, [&](int64_t i) { from_float(hidden_ + i * h, factors[size_t(i)], hidden_ + i * h, Dtype::f32, h); });
      for (int64_t j = 0; j < v; j += weight_chunk(shape_)) {
        const int64_t n = std::min(weight_chunk(shape_), v - j);
        float* product = dweight_begun_ ? staged_ : dweight() + j * h;
        runtime_.gemm(transposed({logits_ + j, rows, n, stride_, 1}), row_major(hidden_, rows, h, h),
                      row_major(product, n, h, h));
        if (dweight_begun_) add(dweight() + j * h, product, n * h);
      }
    }
    dweight_begun_ = true;
    if (out_.dbias) {
      constexpr int64_t columns = 4096;
      runtime_.parallel_for((v + columns - 1) / columns, [&](int64_t block) {
        const int64_t end = std::min(v, (block + 1) * columns);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = block * columns; j < end; ++j)
            out_.dbias[j] += factors[size_t(i)] * logits_[i * stride_ + j];
        }
      });
    }
  }

 private:
  float* dweight() const { return static_cast<float*>(out_.dweight); }

  struct Slot {
    int64_t token;
    float factor;  // dlogits = scale * factor * (signed row)
    float scale;
  };

  void first_logits(const void* hidden, const void* weight, int64_t begin, int64_t rows, float* tile, float* logits) {
    const auto source = [&](int64_t i) {
      return static_cast<const char*>(hidden) + rows_[begin + i] * shape_.hidden * size_of(in_.hidden_dtype);
    };
    tile_logits(runtime_, shape_, in_, weight, rows, source, tile, logits, stride_, staged_);
  }

  Slot row(int64_t i, int64_t token, bool gradient) {
    float* x = logits_ + i * stride_;
    const int64_t v = shape_.vocabulary, target = in_.target[token];
    const float temperature = in_.token_temperature ? in_.token_temperature[token] : in_.temperature;
    const float factor = prepare_row(in_.transform, temperature, x);
    const bool keep = gradient && !logits_kept_;
    const RowStatistics row = read_row(x, v, target, factor, out_.entropy || logits_kept_, keep);
    const ReferenceRow reference = read_reference(i, token, temperature, x, row);
    if (out_.logp) out_.logp[token] = row.softmax.logp;
    if (out_.entropy) out_.entropy[token] = row.softmax.entropy;
    if (out_.kl) out_.kl[token] = reference.divergence;
    if (!gradient) return {token, 0, 0};

    const RowGradient g = loss_(token, row.softmax.logp);
    const float to_logits = in_.transform.logit_scale / temperature;
    Slot slot{token, to_logits, g.logp};
    if (keep) {
      slot.factor *= -std::exp(-row.softmax.offset);
    } else {
      slot.scale = g.scale();
      if (slot.scale != 0) sign_row(in_.transform, x, target, row, g.over(slot.scale), reference);
    }
    if (out_.scale) out_.scale[token] = slot.scale;
    return slot;
  }

  ReferenceRow read_reference(int64_t i, int64_t token, float temperature, const float* row_x,
                              const RowStatistics& row) {
    ReferenceRow reference;
    if (!plan_.reference) return reference;
    float* x = reference_logits_ + i * stride_;
    const float factor = prepare_row(in_.transform, temperature, x);
    const RowStatistics statistics = read_row(x, shape_.vocabulary, in_.target[token], factor, false, false);
    reference = {in_.exact_kl, x, statistics, 0};
    reference.divergence = exact_kl(row_x, shape_.vocabulary, row, reference);
    return reference;
  }

  // Rows with a gradient to the front. Moving a row costs 1 / hidden of the GEMM that it saves.
  int64_t compact(int64_t rows) {
    const int64_t h_bytes = shape_.hidden * (bf16_ ? 2 : 4);
    char* hidden = reinterpret_cast<char*>(hidden_);
    int64_t end = rows;
    for (int64_t i = 0; i < end; ++i) {
      if (slots_[i].scale != 0) continue;
      while (end > i + 1 && slots_[end - 1].scale == 0) --end;
      if (--end <= i) break;
      std::copy_n(logits_ + end * stride_, shape_.vocabulary, logits_ + i * stride_);
      if (plan_.weight_gradient) std::memcpy(hidden + i * h_bytes, hidden + end * h_bytes, size_t(h_bytes));
      slots_[i] = slots_[end];
    }
    return end;
  }

  void add(float* to, const float* from, int64_t n) {
    constexpr int64_t block = 1 << 15;
    runtime_.parallel_for((n + block - 1) / block, [&](int64_t b) {
      const int64_t end = std::min(n, (b + 1) * block);
#pragma omp simd
      for (int64_t i = b * block; i < end; ++i) to[i] += from[i];
    });
  }

  Runtime& runtime_;
  const HeadShape& shape_;
  const HeadPlan& plan_;
  const HeadInputs& in_;
  const HeadOutputs& out_;
  const std::vector<int64_t>& rows_;
  const RowLoss& loss_;
  const bool logits_kept_, bf16_;
  const int64_t stride_;  // of the rows of logits
  bool dweight_begun_ = false;
  std::vector<Slot> slots_;
  float *logits_, *hidden_, *direction_ = nullptr, *reference_logits_ = nullptr, *reference_hidden_ = nullptr, *staged_;
};

// fused_loss.h's Device.
template <class Runtime>
class CpuDevice {
 public:
  using Rows = CpuRows;
  static constexpr bool kWeightByItself = false;

  CpuDevice(Runtime& runtime, const HeadShape& shape, int64_t workspace)
      : runtime_(runtime), shape_(shape), workspace_(workspace) {}

  auto scratch(int64_t bytes) const { return runtime_.scratch(bytes); }

  Rows visit(const Visits& visits, float* weight) const { return longgrpo::visit(visits, weight); }

  void pass(const HeadInputs& in, const HeadOutputs& out, const RowLoss& loss) const {
    pass(in, out, loss, rows_of(loss, in.target, shape_.tokens));
  }

  void pass(const HeadInputs& in, const HeadOutputs& out, const RowLoss& loss, const Rows& rows) const {
    const int64_t active = out.gradient() ? rows.active : 0;
    const bool nothing = rows.order.empty() || (active == 0 && !out.scores());
    const bool dweight_begun = !nothing && tiles(in, out, loss, rows.order, active);
    if (out.dweight && !dweight_begun)
      std::fill_n(static_cast<float*>(out.dweight), shape_.vocabulary * shape_.hidden, 0.0f);
  }

  void correct(const LossArguments& arguments, float* sequence_ratio, float* kept) const {
    longgrpo::correct(arguments, sequence_ratio, kept);
  }

  void sum(const LossArguments& arguments, const LossOutputs& out) const {
    const LossSums sums = longgrpo::sum(arguments);
    *out.loss = sums.loss(), *out.metrics = sums.metrics();
  }

  void copy(const float* from, float* to, int64_t n) const { std::copy_n(from, n, to); }

  // to[i, :] = scale_i from[i, :]; in place is fine.
  void scale_rows(const void* from, void* to, Dtype dtype, const float* scale, int64_t rows, int64_t columns) const {
    const int64_t bytes = columns * size_of(dtype);
    runtime_.parallel_for(rows, [&](int64_t i) {
      thread_local std::vector<float> row;
      row.resize(size_t(columns));
      to_float(static_cast<const char*>(from) + i * bytes, dtype, row.data(), columns);
      from_float(row.data(), scale[i], static_cast<char*>(to) + i * bytes, dtype, columns);
    });
  }

 private:
  // -> whether any row had a gradient
  bool tiles(const HeadInputs& in, const HeadOutputs& out, const RowLoss& loss, const std::vector<int64_t>& rows,
             int64_t active) const {
    const HeadPlan plan =
        plan_cpu(shape_, in, int64_t(rows.size()), active, out.direction, out.dweight || out.dbias, in.reference(),
                 runtime_.threads(), workspace_,
                 runtime_.chosen_rows({shape_.hidden, shape_.vocabulary, in.hidden_dtype, in.weight_dtype}));
    const auto memory = runtime_.scratch(workspace_bytes(plan, shape_, plan.tile_rows) + 4);
    CpuHead<Runtime> head(runtime_, shape_, plan, in, out, rows, loss, static_cast<float*>(memory.data()));
    head_pass(head, plan);
    return head.dweight_begun();
  }

  Runtime& runtime_;
  const HeadShape shape_;
  const int64_t workspace_;
};

// The CPU can look at its targets.
inline void check_targets(const int64_t* target, const HeadShape& shape) {
  for (int64_t t = 0; t < shape.tokens; ++t)
    if (target[t] >= shape.vocabulary)
      throw std::invalid_argument("target[" + std::to_string(t) + "] = " + std::to_string(target[t]) +
                                  " is outside the vocabulary of " + std::to_string(shape.vocabulary) +
                                  " (a negative target is ignored)");
}

}  // namespace longgrpo
