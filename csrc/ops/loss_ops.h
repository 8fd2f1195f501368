// The loss ops, the same on every device: arguments in, outputs made, csrc/head run. A Runtime is a device's part:
//   Runtime runtime(like)                        for the device of a tensor; also what the device's head wants of it
//   runtime.zeros(size, dtype)                   a tensor
//   runtime.dweight(size, dtype of the weight)   as HeadOutputs::dweight wants it
//   runtime.device(shape, workspace, active)     fused_loss.h's Device
//   runtime.check(inputs, shape)                 what the device can see without a wait
//   Runtime::choose(head, choice)                the tiles of this head from now on, in this process
#pragma once

#include <tuple>
#include <vector>

#include "../head/fused_loss.h"
#include "../head/tile_choice.h"
#include "arguments.h"

namespace longgrpo {

// The head's arguments as plain structs.
struct HeadArguments {
  HeadShape shape;
  HeadInputs in;

  HeadArguments(const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                const OptionalTensor& token_temperature, double temperature, double softcap, double logit_scale)
      : shape{hidden.size(0), hidden.size(1), weight.size(0)},
        in{hidden.const_data_ptr(),
           nullptr,
           dtype_of(hidden),
           weight.const_data_ptr(),
           nullptr,
           dtype_of(weight),
           static_cast<const int64_t*>(target.const_data_ptr()),
           pointer(token_temperature),
           float(temperature),
           {shape.vocabulary, float(logit_scale), float(softcap), pointer(bias)},
           ExactKl::none} {}
};

// The tensors behind HeadOutputs' gradients, empty if not wanted.
struct Gradients {
  Tensor direction, scale, dweight, dbias;

  template <class Runtime>
  Gradients(const Runtime& runtime, const HeadShape& shape, ScalarType hidden_dtype, ScalarType weight_dtype,
            bool hidden, bool scale, bool weight, bool bias)
      : direction(runtime.zeros({hidden ? shape.tokens : 0, shape.hidden}, hidden_dtype)),
        scale(runtime.zeros({scale ? shape.tokens : 0}, ScalarType::Float)),
        dweight(runtime.dweight({weight ? shape.vocabulary : 0, shape.hidden}, weight_dtype)),
        dbias(runtime.zeros({bias ? shape.vocabulary : 0}, ScalarType::Float)),
        outputs{.direction = hidden ? direction.mutable_data_ptr() : nullptr,
                .scale = scale ? data(this->scale) : nullptr,
                .dweight = weight ? dweight.mutable_data_ptr() : nullptr,
                .dweight_dtype = dtype_of(dweight),
                .dbias = bias ? data(dbias) : nullptr} {}

  HeadOutputs outputs;
};

struct LossResult {
  Tensor loss, metrics;

  template <class Runtime>
  explicit LossResult(const Runtime& runtime)
      : loss(runtime.zeros({}, ScalarType::Float)),
        metrics(runtime.zeros({int64_t(sizeof(LossMetrics) / sizeof(float))}, ScalarType::Float)) {}

  LossOutputs outputs() const { return {data(loss), reinterpret_cast<LossMetrics*>(data(metrics))}; }
};

template <class Runtime>
struct LossOps {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob(const Tensor& hidden, const Tensor& weight,
                                                                   const Tensor& target, const OptionalTensor& bias,
                                                                   const OptionalTensor& token_temperature,
                                                                   double temperature, double softcap,
                                                                   double logit_scale, bool entropy, bool direction,
                                                                   int64_t workspace, bool normalizer, bool alone) {
    Runtime runtime(hidden);
    HeadArguments head(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale);
    head.in.alone = alone && !normalizer;
    runtime.check(head.in, head.shape);
    const int64_t n = head.shape.tokens;
    Tensor logp = runtime.zeros({n}, ScalarType::Float), ent = runtime.zeros({entropy ? n : 0}, ScalarType::Float);
    Tensor normalizers = runtime.zeros({normalizer ? n : 0, 2}, ScalarType::Float);
    Gradients gradients(runtime, head.shape, hidden.scalar_type(), ScalarType::Float, direction, false, false, false);
    HeadOutputs out = gradients.outputs;
    out.logp = data(logp), out.entropy = entropy ? data(ent) : nullptr;
    if (normalizer) out.normalizer = reinterpret_cast<RowNormalizer*>(data(normalizers));
    runtime.device(head.shape, workspace, n).pass(head.in, out, RowLoss{});
    return {logp, ent, gradients.direction, normalizers};
  }

  static std::tuple<Tensor, Tensor, Tensor> linear_logprob_backward(
      const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
      const OptionalTensor& token_temperature, double temperature, double softcap, double logit_scale,
      const Tensor& logp_grad, const OptionalTensor& entropy_grad, bool need_hidden, bool need_weight, bool need_bias,
      int64_t workspace, const OptionalTensor& logp, const OptionalTensor& normalizer) {
    Runtime runtime(hidden);
    const HeadArguments head(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale);
    runtime.check(head.in, head.shape);
    const Gradients gradients(runtime, head.shape, hidden.scalar_type(), weight.scalar_type(), need_hidden, false,
                              need_weight, need_bias);
    const RowLoss loss{.kind = RowLoss::given, .c = read(logp_grad), .e = pointer(entropy_grad)};
    const auto device = runtime.device(head.shape, workspace, head.shape.tokens);
    if (logp && normalizer)
      weight_pass(device, head, gradients.outputs, read(logp_grad), *logp, *normalizer);
    else
      device.pass(head.in, gradients.outputs, loss);
    return {gradients.direction, gradients.dweight, gradients.dbias};
  }

  static std::tuple<Tensor, Tensor, Tensor> token_loss(const Tensor& logp, const Tensor& token_weight,
                                                       const Tensor& advantages, const OptionalTensor& old_logp,
                                                       const OptionalTensor& ref_logp, const OptionalTensor& importance,
                                                       const OptionalTensor& sampling_logp,
                                                       const OptionalTensor& cu_seqlens, const OptionalTensor& entropy,
                                                       const std::vector<int64_t>& options,
                                                       const std::vector<double>& constants) {
    Runtime runtime(logp);
    const TokenBatch batch = token_batch(token_weight, advantages, old_logp, ref_logp, importance, sampling_logp);
    Tensor gradient = runtime.zeros({batch.tokens}, ScalarType::Float);
    const LossResult result(runtime);
    auto device = runtime.device({batch.tokens, 0, 0}, 0, 0);
    longgrpo::token_loss(device,
                         {loss_config(options, constants), batch, sequences_of(cu_seqlens), read(logp),
                          pointer(entropy), nullptr, data(gradient)},
                         result.outputs());
    return {result.loss, result.metrics, gradient};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_grpo_loss(
      const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
      const OptionalTensor& token_temperature, double temperature, double softcap, double logit_scale,
      const Tensor& token_weight, const Tensor& advantages, const OptionalTensor& old_logp,
      const OptionalTensor& ref_logp, const OptionalTensor& importance, const OptionalTensor& sampling_logp,
      const OptionalTensor& cu_seqlens, const OptionalTensor& ref_hidden, const OptionalTensor& ref_weight,
      const std::vector<int64_t>& options, const std::vector<double>& constants, bool need_hidden, bool need_weight,
      bool need_bias, bool metrics, int64_t workspace, int64_t active) {
    Runtime runtime(hidden);
    const LossConfig config = loss_config(options, constants);
    HeadArguments head(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale);
    runtime.check(head.in, head.shape);
    head.in.exact_kl = exact_kl_of(config);
    head.in.reference_hidden = ref_hidden ? ref_hidden->const_data_ptr() : nullptr;
    head.in.reference_weight = ref_weight ? ref_weight->const_data_ptr() : head.in.weight;
    const int64_t n = head.shape.tokens;
    Tensor logp = runtime.zeros({n}, ScalarType::Float), entropy = runtime.zeros({n}, ScalarType::Float);
    const Gradients gradients(runtime, head.shape, hidden.scalar_type(), weight.scalar_type(), need_hidden, need_hidden,
                              need_weight, need_bias);
    HeadOutputs out = gradients.outputs;
    out.logp = data(logp), out.entropy = data(entropy);
    const LossResult result(runtime);
    auto device = runtime.device(head.shape, workspace, active < 0 ? n : active);
    FusedLoss(device, config, head.shape, head.in,
              token_batch(token_weight, advantages, old_logp, ref_logp, importance, sampling_logp),
              sequences_of(cu_seqlens), out, metrics)
        .run(result.outputs());
    return {result.loss,     result.metrics,    logp,           entropy, gradients.direction,
            gradients.scale, gradients.dweight, gradients.dbias};
  }

  static void choose_tiles(const Tensor&, int64_t hidden, int64_t vocabulary, ScalarType hidden_dtype,
                           ScalarType weight_dtype, const std::vector<int64_t>& choice) {
    Runtime::choose({hidden, vocabulary, dtype_of(hidden_dtype), dtype_of(weight_dtype)}, TileChoice::unpack(choice));
  }

  static void scale_rows_(const Tensor& x, const Tensor& scale) { scale_rows_into(x, scale, x); }

  static Tensor scale_rows(const Tensor& x, const Tensor& scale) {
    Tensor out = torch::stable::empty_like(x);
    scale_rows_into(x, scale, out);
    return out;
  }

 private:
  // The weight's gradient from c and from what linear_logprob has said of every row.
  template <class Device>
  static void weight_pass(const Device& device, const HeadArguments& head, HeadOutputs out, const float* c,
                          const Tensor& logp, const Tensor& normalizer) {
    if constexpr (Device::kWeightByItself) {
      out.direction = nullptr;
      out.logp = data(logp), out.normalizer = reinterpret_cast<RowNormalizer*>(data(normalizer));
      device.weight_pass(head.in, out, c, {head.shape.tokens});
    } else {
      STD_TORCH_CHECK(false, "longgrpo: no pass for only the weight's gradient on this device");
    }
  }

  static void scale_rows_into(const Tensor& x, const Tensor& scale, const Tensor& out) {
    Runtime runtime(x);
    runtime.device({x.size(0), x.size(1), 0}, 0, 0)
        .scale_rows(x.const_data_ptr(), out.mutable_data_ptr(), dtype_of(x), read(scale), x.size(0), x.size(1));
  }
};

// Inside STABLE_TORCH_LIBRARY_IMPL.
#define LONGGRPO_REGISTER_LOSS_OPS(m, ops)                                        \
  m.impl("linear_logprob", LONGGRPO_BOX(&ops::linear_logprob));                   \
  m.impl("linear_logprob_backward", LONGGRPO_BOX(&ops::linear_logprob_backward)); \
  m.impl("token_loss", LONGGRPO_BOX(&ops::token_loss));                           \
  m.impl("choose_tiles", LONGGRPO_BOX(&ops::choose_tiles));                       \
  m.impl("linear_grpo_loss", LONGGRPO_BOX(&ops::linear_grpo_loss));               \
  m.impl("scale_rows", LONGGRPO_BOX(&ops::scale_rows));                           \
  m.impl("scale_rows_", LONGGRPO_BOX(&ops::scale_rows_))

}  // namespace longgrpo
