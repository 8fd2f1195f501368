// The loss ops on CUDA as passes of the head, without torch. Memory is the Runtime's:
//   auto memory = runtime.scratch(bytes);   memory.data(), freed with `memory` in the order of the stream
// Arrays are [tokens], outputs are zeroed, null where not wanted.
#pragma once

#include "head.h"

namespace longgrpo {

template <class Runtime>
void gpu_pass(Runtime& runtime, const HeadShape& shape, const HeadInputs& in, const HeadOutputs& out,
              const RowLoss& loss, int64_t active, int64_t workspace) {
  if (shape.tokens == 0) return;
  const bool gradient = active > 0;
  const GpuWish wish{shape,
                     in.hidden_dtype,
                     in.weight_dtype,
                     in.exact_kl != ExactKl::none && in.reference_hidden,
                     gradient && (out.dweight || out.dbias),
                     gradient && loss.beyond_logp()};
  const GpuPlan plan = runtime.plan(wish, workspace);
  const auto memory = runtime.scratch(plan.bytes());
  GpuHead<Runtime>(runtime, wish, plan, in, out, loss, memory.data()).run(active);
}

template <class Runtime>
void gpu_linear_logprob(Runtime& runtime, const HeadShape& shape, const HeadInputs& in, const HeadOutputs& out,
                        int64_t workspace) {
  gpu_pass(runtime, shape, in, out, RowLoss{}, out.direction ? shape.tokens : 0, workspace);
}

template <class Runtime>
void gpu_linear_logprob_backward(Runtime& runtime, const HeadShape& shape, const HeadInputs& in, const HeadOutputs& out,
                                 const float* logp_grad, const float* entropy_grad, int64_t workspace) {
  RowLoss loss;
  loss.kind = RowLoss::given, loss.c = logp_grad, loss.e = entropy_grad;
  gpu_pass(runtime, shape, in, out, loss, shape.tokens, workspace);
}

struct Sequences {
  const int32_t* bounds;  // [count + 1], or null
  int64_t count;
};

struct LossOutputs {
  float* loss;           // [1]
  LossMetrics* metrics;  // [1]
};

template <class Runtime>
void gpu_token_loss(Runtime& runtime, const LossConfig& config, const TokenBatch& batch, const Sequences& sequences,
                    const float* logp, const float* entropy, const float* exact_kl, float* logp_gradient,
                    const LossOutputs& out) {
  const int64_t partials = loss_partials(config, batch.tokens, sequences.count);
  const auto memory = runtime.scratch(std::max<int64_t>(partials, 1) * int64_t(sizeof(LossSums)));
  launch_token_loss(config, batch, logp, entropy, exact_kl, sequences.bounds, sequences.count, logp_gradient,
                    static_cast<LossSums*>(memory.data()), out.loss, out.metrics, runtime.stream());
}

// The fused loss of one call. How many passes of the head it takes depends on when c = dL/d(logp) is known.
template <class Runtime>
class GpuFusedLoss {
 public:
  // `gradients` names the outputs that are wanted; its scores are this class's own. The first `active` tokens may have
  // a gradient.
  GpuFusedLoss(Runtime& runtime, const LossConfig& config, const HeadShape& shape, const HeadInputs& in,
               const TokenBatch& batch, const Sequences& sequences, const HeadOutputs& gradients, int64_t active,
               bool report, int64_t workspace)
      : runtime_(runtime),
        config_(config),
        shape_(shape),
        in_(in),
        batch_(batch),
        sequences_(sequences),
        gradients_(gradients),
        active_(gradients.direction || gradients.dweight || gradients.dbias ? active : 0),
        exact_(in.exact_kl != ExactKl::none),
        with_entropy_(report || config.entropy_coef != 0),
        workspace_(workspace),
        memory_(runtime.scratch(std::max<int64_t>(1, kArrays * shape.tokens) * int64_t(sizeof(float)))) {
    float* const arrays = static_cast<float*>(memory_.data());
    const int64_t n = shape.tokens;
    logp_ = arrays, entropy_ = arrays + n, kl_ = arrays + 2 * n, c_ = arrays + 3 * n, visited_ = arrays + 4 * n;
    launch_visited(config, batch, in.target, sequences.bounds, sequences.count, report, visited_, runtime.stream());
    batch_.weight = visited_;
    gradients_.kl = exact_ ? kl_ : nullptr;
  }

  void run(const LossOutputs& out) {
    if (!config_.needs_sequence()) {
      pass(with_scores(gradients_), row_loss(RowLoss::token), active_, true);
    } else if (gradients_.direction && !gradients_.dweight && !gradients_.dbias && !beyond_logp()) {
      // A frozen head: dlogp/dhidden now, its factor c once the sequences are whole.
      HeadOutputs directions = with_scores(gradients_);
      directions.scale = nullptr;
      pass(directions, row_loss(RowLoss::direction), active_, false);
      sum(out);
      launch_scale_rows(c_, Dtype::f32, gradients_.scale, Dtype::f32, nullptr, 1, shape_.tokens, runtime_.stream());
      return;
    } else {
      // A scoring pass, then a pass in which every gradient is given.
      pass(with_scores({}), row_loss(RowLoss::direction), 0, false);
      sum(out);
      if (active_ > 0 || exact_) pass(gradients_, row_loss(RowLoss::sequence), active_, true);
    }
    sum(out);
  }

 private:
  static constexpr int64_t kArrays = 5;

  bool beyond_logp() const { return exact_ || config_.entropy_coef != 0; }

  RowLoss row_loss(RowLoss::Kind kind) const { return {kind, c_, nullptr, visited_, batch_, config_}; }

  HeadOutputs with_scores(HeadOutputs out) const {
    out.logp = logp_;
    out.entropy = with_entropy_ ? entropy_ : nullptr;
    return out;
  }

  void pass(const HeadOutputs& out, const RowLoss& loss, int64_t active, bool with_reference) {
    HeadInputs in = in_;
    if (!with_reference) in.exact_kl = ExactKl::none;
    gpu_pass(runtime_, shape_, in, out, loss, active, workspace_);
  }

  void sum(const LossOutputs& out) {
    gpu_token_loss(runtime_, config_, batch_, sequences_, logp_, with_entropy_ ? entropy_ : nullptr,
                   exact_ ? kl_ : nullptr, c_, out);
  }

  Runtime& runtime_;
  const LossConfig config_;
  const HeadShape shape_;
  const HeadInputs in_;
  TokenBatch batch_;
  const Sequences sequences_;
  HeadOutputs gradients_;
  const int64_t active_;
  const bool exact_, with_entropy_;
  const int64_t workspace_;
  const decltype(std::declval<Runtime&>().scratch(0)) memory_;
  float *logp_, *entropy_, *kl_, *c_, *visited_;
};

}  // namespace longgrpo
