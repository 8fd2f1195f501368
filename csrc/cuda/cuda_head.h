// The head on CUDA: head_pass.h's and flash_pass.h's Device, and fused_loss.h's. No torch, no CUDA headers: kernels
// come through launch.h, and the Runtime lends memory, the GEMM and the choice of tiles:
//   runtime.gemm(a, b, c, c_stride, add)   c = a b, or c += a b, with fp32 accumulation and output, any strides, on
//                                          runtime.stream()
//   runtime.chip()                         of the device that the pass runs on
//   runtime.plan(wish, tiling, limit_bytes), runtime.splits(wish, limit_bytes, c_in_row)
//                                          those of a Tiles, unless a test wants tiles of its own
//   runtime.score_plan(shape, inputs, limit_bytes)   of score.h's kernel; nothing: by the other kernels
//   auto memory = runtime.scratch(bytes)   memory.data(), freed with `memory` in the order of the stream
//
// No value on the device is read by the host. Rows are visited in the order they have; a row without a target, outside
// the loss or without a gradient becomes a zero row, which costs its share of the GEMMs and nothing else. That share is
// saved if the host knows such rows: the caller leaves them out of `hidden`, or puts them last and hands in
// `active`.
#pragma once

#include "../head/flash_pass.h"
#include "../head/head_pass.h"
#include "launch.h"
#include "operand.h"
#include "plan.h"
#include "score.h"

namespace longgrpo {

template <class Runtime>
class CudaHead {
 public:
  CudaHead(Runtime& runtime, const CudaWish& wish, const CudaPlan& plan, const HeadInputs& in, const HeadOutputs& out,
           const RowLoss& loss, void* workspace)
      : runtime_(runtime), wish_(wish), plan_(plan), in_(in), out_(out), next_(static_cast<char*>(workspace)) {
    const int64_t rows = plan.tile_rows, h = wish.shape.hidden, v = wish.shape.vocabulary;
    const auto take = [&](int64_t bytes) {
      next_ =
          reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(next_) + kAlignment - 1) & ~uintptr_t(kAlignment - 1));
      char* const begin = next_;
      next_ += bytes;
      return reinterpret_cast<float*>(begin);
    };
    const bool chunks = plan.tiling == Tiling::chunks, whole = plan.tiling == Tiling::whole_rows;
    logits_ = take(4 * rows * plan.stride);
    if (wish.mixed() || (whole && wish.weight_gradient)) hidden_ = take(4 * rows * h);
    if (wish.hidden_gradient && plan.tiling != Tiling::weight) direction_ = take(4 * rows * h);
    if (chunks) {
      const int64_t segments = segments_of(v, plan.chunk);
      chunks_ = {reinterpret_cast<ChunkState*>(take(int64_t(sizeof(ChunkState)) * rows)),
                 reinterpret_cast<PartSums*>(take(kPartBytes * segments * rows)), segments, nullptr, h};
    }
    if (whole) row_scale_ = take(4 * rows);
    if (whole && wish.weight_gradient) normalized_ = take(4 * rows);
    if (plan.tiling == Tiling::weight) normalized_ = take(4 * wish.shape.tokens);
    if (wish.weight_gradient) highest_ = take(4);
    if (wish.reference) reference_logits_ = take(4 * rows * plan.stride);
    if (wish.reference && wish.mixed()) reference_hidden_ = take(4 * rows * h);
    if (wish.mixed()) upcast_ = take(4 * std::min(v, kUpcastRows) * h);
    if (whole && wish.weight_gradient) dweight_ = take(4 * std::min(v, kGradientRows) * h);
    if (plan.tiling == Tiling::weight) dweight_ = take(4 * plan.chunk * h);
    tile_ = {0,
             0,
             plan.stride,
             logits_,
             wish.reference ? reference_logits_ : nullptr,
             in.transform,
             in.token_temperature,
             in.temperature,
             in.target,
             in.exact_kl,
             loss};
  }

  // The first `active` rows may have a gradient.
  void run(int64_t active) {
    const auto [n, h, v] = wish_.shape;
    if (plan_.tiling == Tiling::chunks) return flash_pass(*this, {n, active, plan_.tile_rows, v, plan_.chunk});
    const bool gradient = active > 0;
    const HeadPlan plan{n,
                        active,
                        plan_.tile_rows,
                        0,
                        gradient && out_.direction,
                        gradient && (out_.dweight || out_.dbias),
                        wish_.reference};
    head_pass(*this, plan);
  }

  // Only the weight's gradient, from c = dL/d(logp) [tokens] and what an earlier pass left of every row.
  void run_weight(const float* c) {
    const auto [n, h, v] = wish_.shape;
    c_ = normalized_;
    // c by its largest one: a normalizer of 1e5 tokens must not make fp16 numbers of it.
    launch_normalize(c, normalized_, highest_, n, runtime_.stream());
    weight_pass(*this, {n, n, plan_.tile_rows, v, plan_.chunk});
  }

  // ---- whole rows ----

  void logits(int64_t begin, int64_t rows) {
    product(in_.hidden, in_.weight, begin, rows, 0, wish_.shape.vocabulary, hidden_, logits_);
    if (wish_.reference)
      product(in_.reference_hidden, in_.reference_weight, begin, rows, 0, wish_.shape.vocabulary, reference_hidden_,
              reference_logits_);
  }

  int64_t rows(int64_t begin, int64_t rows, bool gradient) {
    tile_.first = begin, tile_.rows = rows;
    launch_rows(tile_, {out_.logp, out_.entropy, out_.kl, out_.scale, gradient ? row_scale_ : nullptr},
                wish_.gemm_dtype(), runtime_.chip(), runtime_.stream());
    return gradient ? rows : 0;
  }

  void weight_gradient(int64_t rows) {
    const Dtype dtype = wish_.gemm_dtype();
    const int64_t h = wish_.shape.hidden, v = wish_.shape.vocabulary;
    const Operand signed_rows = rewritten(rows, v);
    if (out_.dbias)
      launch_add_columns(out_.dbias, signed_rows.data, dtype, row_scale_, nullptr, rows, v, signed_rows.row_stride,
                         runtime_.stream());
    if (!out_.dweight) return;
    // The rows' scales go into the hidden states, by their largest one: a normalizer of 1e5 tokens must not make fp16
    // numbers of it.
    launch_normalize(row_scale_, normalized_, highest_, rows, runtime_.stream());
    launch_scale_rows(at(in_.hidden, in_.hidden_dtype, tile_.first * h), in_.hidden_dtype, hidden_, dtype, normalized_,
                      rows, h, runtime_.stream());
    const Operand scaled{hidden_, dtype, rows, h, h, 1};
    for (int64_t j = 0; j < v; j += kGradientRows) {
      const int64_t n = std::min(kGradientRows, v - j);
      Operand columns = signed_rows;
      columns.data = at(signed_rows.data, dtype, j);
      columns.columns = n;
      runtime_.gemm(columns.transposed(), scaled, dweight_, h, false);
      float* const to = static_cast<float*>(out_.dweight) + j * h;
      if (tile_.first == 0)
        launch_scale(dweight_, to, Dtype::f32, highest_, n * h, runtime_.stream());
      else
        launch_add(to, dweight_, highest_, n * h, runtime_.stream());
    }
  }

  void hidden_gradient(int64_t rows) {
    const int64_t h = wish_.shape.hidden;
    back_product(rows, 0, wish_.shape.vocabulary, direction_, false);
    launch_scale_rows(direction_, Dtype::f32, at(out_.direction, in_.hidden_dtype, tile_.first * h), in_.hidden_dtype,
                      out_.scale ? nullptr : row_scale_, rows, h, runtime_.stream());
  }

  // ---- chunks ----

  void chunk_logits(int64_t begin, int64_t rows, int64_t column, int64_t columns) {
    product(in_.hidden, in_.weight, begin, rows, column, columns, hidden_, logits_);
  }

  void chunk(int64_t begin, int64_t rows, int64_t column, int64_t columns, bool gradient) {
    tile_.first = begin, tile_.rows = rows;
    chunks_.sums = gradient ? direction_ : nullptr;
    chunks_.before = column / plan_.chunk * ceil_divide(plan_.chunk, kSegment);
    launch_chunk(tile_, column, columns, chunks_, wish_.gemm_dtype(), runtime_.stream());
  }

  void accumulate(int64_t rows, int64_t column, int64_t columns) {
    back_product(rows, column, columns, direction_, column > 0);
  }

  void finish(int64_t begin, int64_t rows, bool gradient) {
    tile_.first = begin, tile_.rows = rows;
    launch_finish(tile_, {out_.logp, out_.entropy, nullptr, gradient ? out_.scale : nullptr, nullptr, out_.normalizer},
                  chunks_, {in_.weight, in_.weight_dtype, out_.direction, in_.hidden_dtype}, runtime_.stream());
  }

  // ---- only the weight's gradient ----

  void weight_rows(int64_t begin, int64_t rows, int64_t column, int64_t columns) {
    const int64_t h = wish_.shape.hidden;
    const Dtype dtype = wish_.gemm_dtype();
    chunk_logits(begin, rows, column, columns);
    tile_.first = begin, tile_.rows = rows;
    launch_weight_rows(tile_, column, columns, c_, out_.logp, out_.normalizer, dtype, runtime_.stream());
    const Operand gradient = rewritten(rows, columns);
    if (out_.dbias)
      launch_add_columns(out_.dbias + column, gradient.data, dtype, nullptr, highest_, rows, columns,
                         gradient.row_stride, runtime_.stream());
    const void* const hidden = wish_.mixed() && in_.hidden_dtype != dtype ? hidden_  // which chunk_logits has upcast
                                                                          : at(in_.hidden, in_.hidden_dtype, begin * h);
    if (out_.dweight) runtime_.gemm(gradient.transposed(), {hidden, dtype, rows, h, h, 1}, dweight_, h, begin > 0);
  }

  void finish_weight(int64_t column, int64_t columns) {
    const int64_t h = wish_.shape.hidden;
    if (out_.dweight)
      launch_scale(dweight_, at(out_.dweight, out_.dweight_dtype, column * h), out_.dweight_dtype, highest_,
                   columns * h, runtime_.stream());
  }

 private:
  // The tile that the row kernels left in place of the logits.
  Operand rewritten(int64_t rows, int64_t columns) const {
    const Dtype dtype = wish_.gemm_dtype();
    const bool half = dtype != Dtype::f32;
    return {half ? at(logits_, dtype, plan_.stride) : logits_, dtype, rows, columns, plan_.stride * (half ? 2 : 1), 1};
  }

  // f(first row, rows, operand [rows, hidden] in the GEMM's dtype) for rows [begin, begin + count) of a weight.
  template <class F>
  void weight_operands(const void* weight, int64_t begin, int64_t count, F&& f) {
    const int64_t h = wish_.shape.hidden, step = wish_.mixed() ? kUpcastRows : count;
    for (int64_t j = 0; j < count; j += step) {
      const int64_t n = std::min(step, count - j);
      const void* rows = at(weight, in_.weight_dtype, (begin + j) * h);
      if (wish_.mixed()) {
        launch_scale_rows(rows, in_.weight_dtype, upcast_, Dtype::f32, nullptr, n, h, runtime_.stream());
        rows = upcast_;
      }
      f(j, n, Operand{rows, wish_.gemm_dtype(), n, h, h, 1});
    }
  }

  // logits [rows, columns] = hidden W^T
  void product(const void* hidden, const void* weight, int64_t begin, int64_t rows, int64_t column, int64_t columns,
               float* tile, float* logits) {
    const int64_t h = wish_.shape.hidden;
    const void* a = at(hidden, in_.hidden_dtype, begin * h);
    if (in_.hidden_dtype != wish_.gemm_dtype()) {
      launch_scale_rows(a, in_.hidden_dtype, tile, Dtype::f32, nullptr, rows, h, runtime_.stream());
      a = tile;
    }
    weight_operands(weight, column, columns, [&](int64_t j, int64_t, const Operand& w) {
      runtime_.gemm({a, wish_.gemm_dtype(), rows, h, h, 1}, w.transposed(), logits + j, plan_.stride, false);
    });
  }

  // to [rows, hidden] = (rewritten logits) W, or += it
  void back_product(int64_t rows, int64_t column, int64_t columns, float* to, bool add) {
    const int64_t h = wish_.shape.hidden;
    const Operand all = rewritten(rows, columns);
    weight_operands(in_.weight, column, columns, [&](int64_t j, int64_t n, const Operand& w) {
      Operand part = all;
      part.data = at(all.data, all.dtype, j);
      part.columns = n;
      runtime_.gemm(part, w, to, h, add || j > 0);
    });
  }

  Runtime& runtime_;
  const CudaWish wish_;
  const CudaPlan plan_;
  const HeadInputs in_;
  const HeadOutputs out_;
  RowTile tile_;
  char* next_;
  float *logits_, *hidden_ = nullptr, *direction_ = nullptr;
  float *row_scale_ = nullptr, *normalized_ = nullptr, *highest_ = nullptr;
  float *reference_logits_ = nullptr, *reference_hidden_ = nullptr, *upcast_ = nullptr, *dweight_ = nullptr;
  const float* c_ = nullptr;
  Chunks chunks_{};
};

// fused_loss.h's Device. Arrays are [tokens], outputs are zeroed.
template <class Runtime>
class CudaDevice {
 public:
  static constexpr bool kWeightByItself = true;

  struct Rows {
    int64_t active;  // the first so many tokens may have a gradient
  };

  CudaDevice(Runtime& runtime, const HeadShape& shape, int64_t workspace, int64_t active)
      : runtime_(runtime), shape_(shape), workspace_(workspace), active_(active) {}

  auto scratch(int64_t bytes) const { return runtime_.scratch(bytes); }

  Rows visit(const Visits& visits, float* weight) const {
    launch_visited(visits, weight, runtime_.stream());
    return {active_};
  }

  // A pass of its own; those of a fused loss take one path, since their logp meet in ratios.
  void pass(const HeadInputs& in, const HeadOutputs& out, const RowLoss& loss) const {
    if (!out.gradient() && shape_.tokens > 0)
      if (const std::optional<ScorePlan> plan = runtime_.score_plan(shape_, in, workspace_))
        return score_pass(runtime_, *plan, shape_, in, out, loss);
    pass(in, out, loss, {shape_.tokens});
  }

  void pass(const HeadInputs& in, const HeadOutputs& out, const RowLoss& loss, const Rows& rows) const {
    const int64_t active = out.gradient() ? rows.active : 0;
    if (shape_.tokens == 0 || !(active > 0 || out.scores())) return;
    const CudaWish wish = wish_of(shape_, in, out, active > 0, loss.beyond_logp());
    const CudaPlan plan = runtime_.plan(wish, tiling_of(wish), workspace_);
    const auto memory = runtime_.scratch(plan.bytes);
    const auto run = [&](const HeadOutputs& to) {
      CudaHead<Runtime>(runtime_, wish, plan, in, to, loss, memory.data()).run(active);
    };
    if (!wish.weight_gradient || !out.dweight || out.dweight_dtype == Dtype::f32) return run(out);
    // Tiles of rows add up in fp32.
    const int64_t n = shape_.vocabulary * shape_.hidden;
    const auto dweight = runtime_.scratch(4 * n);
    HeadOutputs to = out;
    to.dweight = dweight.data(), to.dweight_dtype = Dtype::f32;
    run(to);
    launch_scale(static_cast<const float*>(dweight.data()), out.dweight, out.dweight_dtype, nullptr, n,
                 runtime_.stream());
  }

  bool weight_by_itself(const HeadInputs& in, const HeadOutputs& out, bool beyond_logp, bool c_in_row) const {
    return runtime_.splits(wish_of(shape_, in, out, true, beyond_logp), workspace_, c_in_row);
  }

  void weight_pass(const HeadInputs& in, const HeadOutputs& out, const float* c, const Rows& rows) const {
    if (rows.active == 0) return;
    const HeadShape shape{rows.active, shape_.hidden, shape_.vocabulary};
    const CudaWish wish = wish_of(shape, in, out, true, false);
    const CudaPlan plan = runtime_.plan(wish, Tiling::weight, workspace_);
    const auto memory = runtime_.scratch(plan.bytes);
    CudaHead<Runtime>(runtime_, wish, plan, in, out, RowLoss{}, memory.data()).run_weight(c);
  }

  void correct(const LossArguments& arguments, float* sequence_ratio, float* kept) const {
    launch_correct(arguments, sequence_ratio, kept, runtime_.stream());
  }

  void sum(const LossArguments& arguments, const LossOutputs& out) const {
    const int64_t partials = std::max<int64_t>(loss_partials(arguments), 1);
    const auto memory = runtime_.scratch(partials * int64_t(sizeof(LossSums)));
    launch_token_loss(arguments, static_cast<LossSums*>(memory.data()), out, runtime_.stream());
  }

  void copy(const float* from, float* to, int64_t n) const {
    launch_scale(from, to, Dtype::f32, nullptr, n, runtime_.stream());
  }

  // to[i, :] = scale_i from[i, :]; in place is fine.
  void scale_rows(const void* from, void* to, Dtype dtype, const float* scale, int64_t rows, int64_t columns) const {
    launch_scale_rows(from, dtype, to, dtype, scale, rows, columns, runtime_.stream());
  }

 private:
  static CudaWish wish_of(const HeadShape& shape, const HeadInputs& in, const HeadOutputs& out, bool gradient,
                          bool beyond_logp) {
    return {shape,
            in.hidden_dtype,
            in.weight_dtype,
            in.reference(),
            gradient && out.direction,
            gradient && (out.dweight || out.dbias),
            gradient && beyond_logp};
  }

  Runtime& runtime_;
  const HeadShape shape_;
  const int64_t workspace_, active_;
};

}  // namespace longgrpo
