// The head on CUDA: head_pass.h's and flash_pass.h's Device, and fused_loss.h's. No torch, no CUDA headers: kernels
// come through launch.h, and the Runtime lends memory and the GEMM:
//   runtime.gemm(a, b, c, c_stride)    c = a b with fp32 accumulation and output, any strides, on runtime.stream()
//   runtime.chip()                     of the device that the pass runs on
//   runtime.plan(wish, limit_bytes)    plan_cuda, unless a test wants a tiling of its own
//   runtime.score_plan(shape, inputs, limit_bytes)   nothing, unless score.h's kernel was asked for and can_score
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
#include "score.h"

namespace longgrpo {

struct Operand {
  const void* data;
  Dtype dtype;
  int64_t rows, columns, row_stride, column_stride;

  Operand transposed() const { return {data, dtype, columns, rows, column_stride, row_stride}; }
};

inline const void* at(const void* data, Dtype dtype, int64_t i) {
  return static_cast<const char*>(data) + i * size_of(dtype);
}
inline void* at(void* data, Dtype dtype, int64_t i) { return static_cast<char*>(data) + i * size_of(dtype); }

// What a pass wants, as far as memory and tiling are concerned.
struct CudaWish {
  HeadShape shape;
  Dtype hidden_dtype, weight_dtype;
  bool reference, weight_gradient;
  bool beyond_logp;  // a gradient of the entropy or of the exact KL

  // Operands of one dtype go to the GEMM as they are; a mixture is upcast.
  bool mixed() const { return hidden_dtype != weight_dtype; }
  Dtype gemm_dtype() const { return mixed() ? Dtype::f32 : hidden_dtype; }
  bool can_chunk() const { return !weight_gradient && !reference && !beyond_logp; }
};

struct CudaPlan {
  bool flash;
  int64_t tile_rows;
  int64_t chunk;      // vocabulary columns at a time; all of them unless `flash`
  int64_t stride;     // of a row of logits
  int64_t row_bytes;  // of workspace
  int64_t fixed_bytes;

  int64_t bytes() const { return tile_rows * row_bytes + fixed_bytes; }
};

constexpr int64_t kUpcastRows = 4096;                   // rows of a mixed head's weight that are upcast at once
constexpr int64_t kGradientRows = 2048;                 // rows of dW whose fp32 product stays in L2 until it is added
constexpr int64_t kGemmRows = 128, kGemmColumns = 256;  // output tile of a library GEMM at full rate
constexpr int64_t kAlignment = 256;

inline int64_t fixed_bytes(const CudaWish& wish) {
  constexpr int64_t kParts = 12;  // each is aligned
  const int64_t upcast = wish.mixed() ? std::min(wish.shape.vocabulary, kUpcastRows) : 0;
  const int64_t gradient = wish.weight_gradient ? std::min(wish.shape.vocabulary, kGradientRows) : 0;
  return kParts * kAlignment + 4 + 4 * wish.shape.hidden * (upcast + gradient);
}

// The two tilings, without their tile_rows.
inline CudaPlan whole_rows(const CudaWish& wish) {
  const int64_t v = wish.shape.vocabulary, stride = (v + kStrideUnit - 1) / kStrideUnit * kStrideUnit;
  const int64_t references = wish.reference ? 1 : 0;  // logits and hidden tile; beside them: direction, two scales
  return {false,
          0,
          v,
          stride,
          4 * (stride * (1 + references) + wish.shape.hidden * (2 + references) + 2),
          fixed_bytes(wish)};
}

inline CudaPlan row_chunks(const CudaWish& wish, int64_t columns = kBlockColumns) {
  const int64_t chunk = std::min(columns, whole_rows(wish).stride);  // logits, hidden tile, direction, product
  return {true, 0, chunk, chunk, 4 * (chunk + 3 * wish.shape.hidden) + int64_t(sizeof(ChunkState)), fixed_bytes(wish)};
}

inline CudaPlan with_tile(CudaPlan plan, const CudaWish& wish, int64_t limit_bytes) {
  plan.tile_rows = rows_of_a_tile(wish.shape.tokens, plan.row_bytes, plan.fixed_bytes, limit_bytes, kGemmRows);
  return plan;
}

// The rule, to be overturned only by measurement. Whole rows, unless their tile is too small for the second GEMM to
// give every multiprocessor a tile of its output; then chunks, if the loss permits them. Both tilings give the same
// logp bit for bit (see softmax.cuh), as far as the library's GEMM does for their two shapes; so that it need not, the
// rule does not ask whether there is a gradient: scoring and a frozen head's gradient take the same tiling.
inline CudaPlan plan_cuda(const CudaWish& wish, int64_t limit_bytes, const Chip& chip) {
  const CudaPlan rows = whole_rows(wish);
  if (!wish.can_chunk()) return with_tile(rows, wish, limit_bytes);
  if (rows.row_bytes * kMinTileRows + rows.fixed_bytes <= limit_bytes) {
    const CudaPlan plan = with_tile(rows, wish, limit_bytes);
    const int64_t output = plan.tile_rows * wish.shape.hidden;
    if (plan.tile_rows >= wish.shape.tokens || output >= chip.multiprocessors * kGemmRows * kGemmColumns) return plan;
  }
  return with_tile(row_chunks(wish), wish, limit_bytes);
}

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
    logits_ = take(4 * rows * plan.stride);
    hidden_ = take(4 * rows * h);
    direction_ = take(4 * rows * h);
    if (plan.flash) product_ = take(4 * rows * h);
    if (plan.flash) states_ = reinterpret_cast<ChunkState*>(take(int64_t(sizeof(ChunkState)) * rows));
    if (!plan.flash) row_scale_ = take(4 * rows), normalized_ = take(4 * rows), highest_ = take(4);
    if (wish.reference) reference_logits_ = take(4 * rows * plan.stride), reference_hidden_ = take(4 * rows * h);
    if (wish.mixed()) upcast_ = take(4 * std::min(v, kUpcastRows) * h);
    if (wish.weight_gradient) dweight_ = take(4 * std::min(v, kGradientRows) * h);
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
    if (plan_.flash) return flash_pass(*this, {n, active, plan_.tile_rows, v, plan_.chunk});
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
      launch_add_columns(out_.dbias, signed_rows.data, dtype, row_scale_, rows, v, signed_rows.row_stride,
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
      runtime_.gemm(columns.transposed(), scaled, dweight_, h);
      launch_add(out_.dweight + j * h, dweight_, highest_, n * h, runtime_.stream());
    }
  }

  void hidden_gradient(int64_t rows) {
    const int64_t h = wish_.shape.hidden;
    back_product(rows, 0, wish_.shape.vocabulary, direction_);
    launch_scale_rows(direction_, Dtype::f32, at(out_.direction, in_.hidden_dtype, tile_.first * h), in_.hidden_dtype,
                      out_.scale ? nullptr : row_scale_, rows, h, runtime_.stream());
  }

  // ---- chunks ----

  void chunk_logits(int64_t begin, int64_t rows, int64_t column, int64_t columns) {
    product(in_.hidden, in_.weight, begin, rows, column, columns, hidden_, logits_);
  }

  void chunk(int64_t begin, int64_t rows, int64_t column, int64_t columns, bool gradient) {
    tile_.first = begin, tile_.rows = rows;
    launch_chunk(tile_, column, columns, states_, gradient, wish_.gemm_dtype(), runtime_.stream());
  }

  void accumulate(int64_t rows, int64_t column, int64_t columns) {
    const bool first = column == 0;
    back_product(rows, column, columns, first ? direction_ : product_);
    if (!first) launch_rescale_add(direction_, product_, states_, rows, wish_.shape.hidden, runtime_.stream());
  }

  void finish(int64_t begin, int64_t rows, bool gradient) {
    tile_.first = begin, tile_.rows = rows;
    launch_finish(tile_, {out_.logp, out_.entropy, nullptr, gradient ? out_.scale : nullptr, nullptr}, states_,
                  gradient ? direction_ : nullptr, in_.weight, in_.weight_dtype, out_.direction, in_.hidden_dtype,
                  wish_.shape.hidden, runtime_.stream());
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
  void weight_rows(const void* weight, int64_t begin, int64_t count, F&& f) {
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
    weight_rows(weight, column, columns, [&](int64_t j, int64_t, const Operand& w) {
      runtime_.gemm({a, wish_.gemm_dtype(), rows, h, h, 1}, w.transposed(), logits + j, plan_.stride);
    });
  }

  // to [rows, hidden] = (rewritten logits) W
  void back_product(int64_t rows, int64_t column, int64_t columns, float* to) {
    const int64_t h = wish_.shape.hidden;
    const Operand all = rewritten(rows, columns);
    weight_rows(in_.weight, column, columns, [&](int64_t j, int64_t n, const Operand& w) {
      Operand part = all;
      part.data = at(all.data, all.dtype, j);
      part.columns = n;
      float* const c = j == 0 ? to : hidden_;  // the hidden tile is free now
      runtime_.gemm(part, w, c, h);
      if (j > 0) launch_add(to, c, nullptr, rows * h, runtime_.stream());
    });
  }

  Runtime& runtime_;
  const CudaWish wish_;
  const CudaPlan plan_;
  const HeadInputs in_;
  const HeadOutputs out_;
  RowTile tile_;
  char* next_;
  float *logits_, *hidden_, *direction_, *product_ = nullptr;
  float *row_scale_ = nullptr, *normalized_ = nullptr, *highest_ = nullptr;
  float *reference_logits_ = nullptr, *reference_hidden_ = nullptr, *upcast_ = nullptr, *dweight_ = nullptr;
  ChunkState* states_ = nullptr;
};

// fused_loss.h's Device. Arrays are [tokens], outputs are zeroed.
template <class Runtime>
class CudaDevice {
 public:
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
    const bool gradient = active > 0;
    if (shape_.tokens == 0 || !(gradient || out.scores())) return;
    const CudaWish wish{shape_,
                        in.hidden_dtype,
                        in.weight_dtype,
                        in.reference(),
                        gradient && (out.dweight || out.dbias),
                        gradient && loss.beyond_logp()};
    const CudaPlan plan = runtime_.plan(wish, workspace_);
    const auto memory = runtime_.scratch(plan.bytes());
    CudaHead<Runtime>(runtime_, wish, plan, in, out, loss, memory.data()).run(active);
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
    launch_scale_rows(from, Dtype::f32, to, Dtype::f32, nullptr, 1, n, runtime_.stream());
  }

  // to[i, :] = scale_i from[i, :]; in place is fine.
  void scale_rows(const void* from, void* to, Dtype dtype, const float* scale, int64_t rows, int64_t columns) const {
    launch_scale_rows(from, dtype, to, dtype, scale, rows, columns, runtime_.stream());
  }

 private:
  Runtime& runtime_;
  const HeadShape shape_;
  const int64_t workspace_, active_;
};

}  // namespace longgrpo
