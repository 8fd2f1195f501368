// Schemas of the loss ops and their CPU kernels. Shapes: N tokens, H hidden, V vocabulary, S sequences.
#include <sys/mman.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/token_loss.h"
#include "arguments.h"
#include "torch_runtime.h"

#define HEAD_ARGUMENTS                                                                                        \
  "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? token_temperature, float temperature, " \
  "float softcap, float logit_scale, "
#define TOKEN_ARGUMENTS                                                                                      \
  "Tensor token_weight, Tensor advantages, Tensor? old_logp, Tensor? ref_logp, Tensor? importance, Tensor? " \
  "cu_seqlens, "
#define CONFIG_ARGUMENTS "int[] options, float[] constants"

STABLE_TORCH_LIBRARY(longgrpo, m) {
  m.def("linear_logprob(" HEAD_ARGUMENTS
        "bool entropy, bool direction, int workspace) -> (Tensor logp, Tensor entropy, Tensor direction)");
  m.def("linear_logprob_backward(" HEAD_ARGUMENTS
        "Tensor logp_grad, Tensor? entropy_grad, bool need_hidden, bool need_weight, bool need_bias, int workspace) -> "
        "(Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)");
  m.def("token_loss(Tensor logp, " TOKEN_ARGUMENTS "Tensor? entropy, " CONFIG_ARGUMENTS
        ") -> (Tensor loss, Tensor metrics, Tensor logp_grad)");
  m.def("linear_grpo_loss(" HEAD_ARGUMENTS TOKEN_ARGUMENTS "Tensor? ref_hidden, Tensor? ref_weight, " CONFIG_ARGUMENTS
        ", bool need_hidden, bool need_weight, bool need_bias, bool metrics, int workspace, int active=-1) -> "
        "(Tensor loss, Tensor metrics, Tensor direction, Tensor scale, Tensor weight_grad, Tensor bias_grad)");
  m.def("scale_rows(Tensor x, Tensor scale) -> Tensor");
  m.def("scale_rows_(Tensor(a!) x, Tensor scale) -> ()");
}

namespace longgrpo {
namespace {

// Large tensors are new to the process in every call. Faulting the workspace in by pages of 4 KiB costs a bf16 scoring
// pass of SmolLM2's head a third of its time.
void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

Tensor empty(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, size, dtype);
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * int64_t(tensor.element_size()));
  return tensor;
}

Tensor zeros(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  Tensor tensor = empty(like, size, dtype);
  return torch::stable::zero_(tensor);
}

// The head of one call: inputs as the pass wants them, and one pass after another over them.
struct Head {
  HeadShape shape;
  HeadInputs in;
  int64_t workspace;
  Tensor like;

  Head(const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
       const OptionalTensor& token_temperature, double temperature, double softcap, double logit_scale,
       int64_t workspace_bytes)
      : shape{hidden.size(0), hidden.size(1), weight.size(0)}, workspace(workspace_bytes), like(hidden) {
    in = {hidden.const_data_ptr(),
          nullptr,
          dtype_of(hidden),
          weight.const_data_ptr(),
          nullptr,
          dtype_of(weight),
          static_cast<const int64_t*>(target.const_data_ptr()),
          pointer(token_temperature),
          float(temperature),
          {shape.vocabulary, float(logit_scale), float(softcap), pointer(bias)},
          ExactKl::none};
    for (int64_t t = 0; t < shape.tokens; ++t)
      if (in.target[t] >= shape.vocabulary)
        throw std::invalid_argument("target[" + std::to_string(t) + "] = " + std::to_string(in.target[t]) +
                                    " is outside the vocabulary of " + std::to_string(shape.vocabulary) +
                                    " (a negative target is ignored)");
  }

  std::vector<int64_t> rows_with_target() const {
    std::vector<int64_t> rows;
    for (int64_t t = 0; t < shape.tokens; ++t)
      if (in.target[t] >= 0) rows.push_back(t);
    return rows;
  }

  void pass(const std::vector<int64_t>& rows, int64_t active, const HeadOutputs& out, const RowLoss& loss,
            bool logits_kept) const {
    const bool dweight_begun = !rows.empty() && tiles(rows, active, out, loss, logits_kept);
    if (out.dweight && !dweight_begun) std::fill_n(out.dweight, shape.vocabulary * shape.hidden, 0.0f);
  }

 private:
  // -> whether any row had a gradient
  bool tiles(const std::vector<int64_t>& rows, int64_t active, const HeadOutputs& out, const RowLoss& loss,
             bool logits_kept) const {
    TorchRuntime runtime;
    HeadPlan plan{int64_t(rows.size()),
                  active,
                  0,
                  staging_bytes(shape, in, out.dweight, runtime.threads()),
                  out.direction != nullptr,
                  out.dweight || out.dbias,
                  in.exact_kl != ExactKl::none && in.reference_hidden};
    plan = plan_tiles(plan, shape, workspace);
    const int64_t bytes = workspace_bytes(plan, shape, plan.tile_rows);
    Tensor space = torch::stable::new_empty(like, {bytes / 4 + 1}, ScalarType::Float);
    advise_huge_pages(space.mutable_data_ptr(), bytes);
    CpuHead<TorchRuntime> head(runtime, shape, plan, in, out, rows, loss, logits_kept,
                               static_cast<float*>(space.mutable_data_ptr()));
    head_pass(head, plan);
    return head.dweight_begun();
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                                  const OptionalTensor& bias, const OptionalTensor& token_temperature,
                                                  double temperature, double softcap, double logit_scale, bool entropy,
                                                  bool direction, int64_t workspace) {
  const Head head(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale, workspace);
  const int64_t n = head.shape.tokens;
  Tensor logp = zeros(hidden, {n}, ScalarType::Float);
  Tensor ent = zeros(hidden, {entropy ? n : 0}, ScalarType::Float);
  Tensor u = zeros(hidden, {direction ? n : 0, head.shape.hidden}, hidden.scalar_type());
  const HeadOutputs out{
      data(logp), entropy ? data(ent) : nullptr, nullptr, direction ? u.mutable_data_ptr() : nullptr, nullptr, nullptr,
      nullptr};
  const std::vector<int64_t> rows = head.rows_with_target();
  head.pass(rows, int64_t(rows.size()), out, [](int64_t, float) { return RowGradient{1, 0, 0}; }, false);
  return {logp, ent, u};
}

std::tuple<Tensor, Tensor, Tensor> linear_logprob_backward(const Tensor& hidden, const Tensor& weight,
                                                           const Tensor& target, const OptionalTensor& bias,
                                                           const OptionalTensor& token_temperature, double temperature,
                                                           double softcap, double logit_scale, const Tensor& logp_grad,
                                                           const OptionalTensor& entropy_grad, bool need_hidden,
                                                           bool need_weight, bool need_bias, int64_t workspace) {
  const Head head(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale, workspace);
  const auto [n, h, v] = head.shape;
  Tensor dhidden = zeros(hidden, {need_hidden ? n : 0, h}, hidden.scalar_type());
  Tensor dweight = empty(hidden, {need_weight ? v : 0, h}, ScalarType::Float);
  Tensor dbias = zeros(hidden, {need_bias ? v : 0}, ScalarType::Float);
  const HeadOutputs out{.direction = need_hidden ? dhidden.mutable_data_ptr() : nullptr,
                        .dweight = need_weight ? data(dweight) : nullptr,
                        .dbias = need_bias ? data(dbias) : nullptr};
  const float *c = read(logp_grad), *e = pointer(entropy_grad);
  std::vector<int64_t> rows;
  for (int64_t t : head.rows_with_target())
    if (c[t] != 0 || (e && e[t] != 0)) rows.push_back(t);
  head.pass(
      rows, int64_t(rows.size()), out, [=](int64_t t, float) { return RowGradient{c[t], e ? e[t] : 0.0f, 0}; },
      e != nullptr);
  return {dhidden, dweight, dbias};
}

struct LossResult {
  Tensor loss, metrics;
};

LossResult finish_loss(const LossSums& sums, const Tensor& like) {
  Tensor loss = zeros(like, {}, ScalarType::Float);
  *data(loss) = sums.loss();
  constexpr int64_t count = sizeof(LossMetrics) / sizeof(float);
  Tensor metrics = zeros(like, {count}, ScalarType::Float);
  *reinterpret_cast<LossMetrics*>(data(metrics)) = sums.metrics();
  return {loss, metrics};
}

std::tuple<Tensor, Tensor, Tensor> token_loss_op(const Tensor& logp, const Tensor& token_weight,
                                                 const Tensor& advantages, const OptionalTensor& old_logp,
                                                 const OptionalTensor& ref_logp, const OptionalTensor& importance,
                                                 const OptionalTensor& cu_seqlens, const OptionalTensor& entropy,
                                                 const std::vector<int64_t>& options,
                                                 const std::vector<double>& constants) {
  const LossConfig config = loss_config(options, constants);
  const TokenBatch batch = token_batch(token_weight, advantages, old_logp, ref_logp, importance);
  Tensor gradient = zeros(logp, {batch.tokens}, ScalarType::Float);
  const LossSums sums = token_loss(config, batch, read(logp), pointer(entropy), nullptr, pointer<int32_t>(cu_seqlens),
                                   cu_seqlens ? cu_seqlens->numel() - 1 : 0, data(gradient));
  const auto [loss, metrics] = finish_loss(sums, logp);
  return {loss, metrics, gradient};
}

// Tokens of the loss in the order of the pass: first those that can have a gradient, then those that only report.
struct RowOrder {
  std::vector<int64_t> rows;
  int64_t active;
};

RowOrder order_rows(const LossConfig& config, const TokenBatch& batch, const int64_t* target, const int32_t* cu_seqlens,
                    int64_t sequences, bool report) {
  const auto in_loss = [&](int64_t t) { return batch.weight[t] != 0 && target[t] >= 0; };
  RowOrder order{{}, 0};
  std::vector<int64_t> quiet;
  const auto visit = [&](int64_t begin, int64_t end, bool active) {
    for (int64_t t = begin; t < end; ++t)
      if (in_loss(t)) (active ? order.rows : quiet).push_back(t);
  };
  if (config.needs_sequence()) {  // one token's advantage can move every token of its sequence
    for (int64_t s = 0; s < sequences; ++s) {
      bool active = false;
      for (int64_t t = cu_seqlens[s]; t < cu_seqlens[s + 1] && !active; ++t)
        active = in_loss(t) && batch.moves(config, t);
      visit(cu_seqlens[s], cu_seqlens[s + 1], active);
    }
  } else {
    for (int64_t t = 0; t < batch.tokens; ++t) visit(t, t + 1, in_loss(t) && batch.moves(config, t));
  }
  order.active = int64_t(order.rows.size());
  if (report) order.rows.insert(order.rows.end(), quiet.begin(), quiet.end());
  return order;
}

// The fused loss of one call. How many passes of the head it takes depends on when c = dL/d(logp) is known.
class FusedLoss {
 public:
  FusedLoss(const LossConfig& config, const Head& head, const TokenBatch& batch, const OptionalTensor& cu_seqlens,
            bool need_hidden, bool need_weight, bool need_bias, bool report)
      : config_(config),
        head_(head),
        batch_(batch),
        bounds_(pointer<int32_t>(cu_seqlens)),
        sequences_(cu_seqlens ? cu_seqlens->numel() - 1 : 0),
        kl_kind_(exact_kl_of(config)),
        order_(order_rows(config, batch, head.in.target, bounds_, sequences_, report)),
        report_(report) {
    const auto [n, h, v] = head.shape;
    const auto f32 = [&](bool wanted, int64_t size) {
      return zeros(head.like, {wanted ? size : 0}, ScalarType::Float);
    };
    logp_ = f32(true, n), entropy_ = f32(true, n), kl_ = f32(exact(), n), c_ = f32(true, n),
    scale = f32(need_hidden, n);
    direction = zeros(head.like, {need_hidden ? n : 0, h}, head.like.scalar_type());
    dweight = empty(head.like, {need_weight ? v : 0, h}, ScalarType::Float);
    dbias = f32(need_bias, v);
    gradients_ = {.kl = exact() ? data(kl_) : nullptr,
                  .direction = need_hidden ? direction.mutable_data_ptr() : nullptr,
                  .scale = need_hidden ? data(scale) : nullptr,
                  .dweight = need_weight ? data(dweight) : nullptr,
                  .dbias = need_bias ? data(dbias) : nullptr};
    // What the pass does not visit is outside the loss, its metrics included.
    weight_ = f32(true, n);
    for (int64_t t : order_.rows) data(weight_)[t] = batch.weight[t];
    batch_.weight = data(weight_);
  }

  LossSums run() {
    if (!config_.needs_sequence()) return one_pass();
    const bool frozen = gradients_.direction && !gradients_.dweight && !gradients_.dbias;
    return frozen && !logits_kept() ? direction_then_factor() : score_then_gradients();
  }

  Tensor direction, scale, dweight, dbias;

 private:
  bool exact() const { return kl_kind_ != ExactKl::none; }
  bool logits_kept() const { return exact() || config_.entropy_coef != 0; }

  LossSums sum() {
    return token_loss(config_, batch_, data(logp_), data(entropy_), exact() ? data(kl_) : nullptr, bounds_, sequences_,
                      data(c_));
  }

  RowGradient row_gradient(int64_t t, float c) const {
    const float w = batch_.weight[t];
    return {c, -config_.entropy_coef * w, exact() ? config_.beta * w : 0.0f};
  }

  HeadOutputs with_scores(HeadOutputs out) {
    out.logp = data(logp_);
    out.entropy = report_ || config_.entropy_coef != 0 ? data(entropy_) : nullptr;
    return out;
  }

  void pass(const HeadOutputs& out, int64_t active, const RowLoss& loss, bool with_reference) {
    head_.in.exact_kl = with_reference ? kl_kind_ : ExactKl::none;
    head_.pass(order_.rows, active, out, loss, logits_kept());
  }

  // c is known in the row.
  LossSums one_pass() {
    const RowLoss loss = [this](int64_t t, float logp) {
      const Token token = batch_.at(t, logp);
      return row_gradient(t, logp_gradient(config_, token_term(config_, token), token, batch_.weight[t]));
    };
    pass(with_scores(gradients_), order_.active, loss, true);
    return sum();
  }

  // A frozen head: dlogp/dhidden now, its factor c once the sequences are whole.
  LossSums direction_then_factor() {
    const RowLoss unit = [](int64_t, float) { return RowGradient{1, 0, 0}; };
    pass(with_scores(gradients_), order_.active, unit, false);
    const LossSums sums = sum();
    std::copy(data(c_), data(c_) + batch_.tokens, data(scale));
    return sums;
  }

  // A scoring pass, then a pass in which every gradient is given.
  LossSums score_then_gradients() {
    pass(with_scores({}), 0, nullptr, false);
    sum();
    const RowLoss given = [this](int64_t t, float) { return row_gradient(t, data(c_)[t]); };
    if (gradients_.direction || gradients_.dweight || gradients_.dbias || exact())
      pass(gradients_, order_.active, given, true);
    return sum();
  }

  const LossConfig& config_;
  Head head_;
  TokenBatch batch_;
  const int32_t* bounds_;
  const int64_t sequences_;
  const ExactKl kl_kind_;
  const RowOrder order_;
  const bool report_;
  Tensor logp_, entropy_, kl_, c_, weight_;
  HeadOutputs gradients_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_grpo_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    const OptionalTensor& token_temperature, double temperature, double softcap, double logit_scale,
    const Tensor& token_weight, const Tensor& advantages, const OptionalTensor& old_logp,
    const OptionalTensor& ref_logp, const OptionalTensor& importance, const OptionalTensor& cu_seqlens,
    const OptionalTensor& ref_hidden, const OptionalTensor& ref_weight, const std::vector<int64_t>& options,
    const std::vector<double>& constants, bool need_hidden, bool need_weight, bool need_bias, bool metrics,
    int64_t workspace, int64_t /*active: order_rows looks for itself*/) {
  const LossConfig config = loss_config(options, constants);
  Head head(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale, workspace);
  head.in.reference_hidden = ref_hidden ? ref_hidden->const_data_ptr() : nullptr;
  head.in.reference_weight = ref_weight ? ref_weight->const_data_ptr() : head.in.weight;
  const TokenBatch batch = token_batch(token_weight, advantages, old_logp, ref_logp, importance);
  FusedLoss fused(config, head, batch, cu_seqlens, need_hidden, need_weight, need_bias, metrics);
  const auto [loss, report] = finish_loss(fused.run(), hidden);
  return {loss, report, fused.direction, fused.scale, fused.dweight, fused.dbias};
}

void scale_rows_(const Tensor& x, const Tensor& scale) {
  const int64_t n = x.size(0), h = x.size(1);
  const Dtype dtype = dtype_of(x);
  char* rows = static_cast<char*>(x.mutable_data_ptr());
  const float* factor = read(scale);
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(h));
    for (int64_t t = begin; t < end; ++t) {
      void* at = rows + t * h * size_of(dtype);
      to_float(at, dtype, row.data(), h);
      from_float(row.data(), factor[t], at, dtype, h);
    }
  });
}

Tensor scale_rows(const Tensor& x, const Tensor& scale) {
  Tensor out = torch::stable::clone(x);
  scale_rows_(out, scale);
  return out;
}

}  // namespace
}  // namespace longgrpo

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CPU, m) {
  m.impl("linear_logprob", TORCH_BOX(&longgrpo::linear_logprob));
  m.impl("linear_logprob_backward", TORCH_BOX(&longgrpo::linear_logprob_backward));
  m.impl("token_loss", TORCH_BOX(&longgrpo::token_loss_op));
  m.impl("linear_grpo_loss", TORCH_BOX(&longgrpo::linear_grpo_loss));
  m.impl("scale_rows", TORCH_BOX(&longgrpo::scale_rows));
  m.impl("scale_rows_", TORCH_BOX(&longgrpo::scale_rows_));
}
