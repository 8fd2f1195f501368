// The loss ops on CUDA: the same schemas as loss.cpp. On the current stream, without a wait for the device, with no
// memory but torch's; so it can be captured into a graph and runs on any device and stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <tuple>

#include "../kernels/loss.h"
#include "arguments.h"

namespace longgrpo {

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor zeros(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_zeros(like, size, dtype);
}

ScalarType scalar_type_of(Dtype dtype) {
  return dtype == Dtype::f32 ? ScalarType::Float : dtype == Dtype::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

class Scratch {
 public:
  explicit Scratch(Tensor memory) : memory_(std::move(memory)) {}
  void* data() const { return memory_.mutable_data_ptr(); }

 private:
  Tensor memory_;
};

// Torch's GEMM, allocator and stream, for the device of the tensors.
class CudaRuntime {
 public:
  explicit CudaRuntime(const Tensor& like)
      : like_(like), device_(like.device()), guard_(device_.index()), chip_(use_device(device_.index())) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream_));
  }

  const Chip& chip() const { return chip_; }
  Stream stream() const { return stream_; }
  GpuPlan plan(const GpuWish& wish, int64_t limit_bytes) const { return plan_gpu(wish, limit_bytes, chip_); }
  Scratch scratch(int64_t bytes) const { return Scratch(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte)); }

  // fp32 operands follow torch's own setting of TF32 (off unless torch.backends.cuda.matmul.allow_tf32 says so).
  void gemm(const Operand& a, const Operand& b, float* c, int64_t c_stride) const {
    const Tensor out = view(c, Dtype::f32, a.rows, b.columns, c_stride, 1);
    const Tensor x = view(const_cast<void*>(a.data), a.dtype, a.rows, a.columns, a.row_stride, a.column_stride);
    const Tensor y = view(const_cast<void*>(b.data), b.dtype, b.rows, b.columns, b.row_stride, b.column_stride);
    if (a.dtype == Dtype::f32) {
      std::array<StableIValue, 3> stack{from(x), from(y), from(out)};
      call("out", stack.data());
    } else {
      std::array<StableIValue, 4> stack{from(x), from(y), from(ScalarType::Float), from(out)};
      call("dtype_out", stack.data());
    }
  }

 private:
  Tensor view(void* data, Dtype dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) const {
    return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride}, device_, scalar_type_of(dtype));
  }
  static void call(const char* overload, StableIValue* stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack, TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);  // takes the returned reference
  }

  const Tensor like_;
  const torch::stable::Device device_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const Chip chip_;
  void* stream_ = nullptr;
};

struct Head {
  HeadShape shape;
  HeadInputs in;
};

Head head_of(const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
             const OptionalTensor& token_temperature, double temperature, double softcap, double logit_scale) {
  const HeadShape shape{hidden.size(0), hidden.size(1), weight.size(0)};
  return {shape,
          {hidden.const_data_ptr(),
           nullptr,
           dtype_of(hidden),
           weight.const_data_ptr(),
           nullptr,
           dtype_of(weight),
           static_cast<const int64_t*>(target.const_data_ptr()),
           pointer(token_temperature),
           float(temperature),
           {shape.vocabulary, float(logit_scale), float(softcap), pointer(bias)},
           ExactKl::none}};
}

std::tuple<Tensor, Tensor, Tensor> linear_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                                  const OptionalTensor& bias, const OptionalTensor& token_temperature,
                                                  double temperature, double softcap, double logit_scale, bool entropy,
                                                  bool direction, int64_t workspace) {
  CudaRuntime runtime(hidden);
  const Head head = head_of(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale);
  const int64_t n = head.shape.tokens;
  Tensor logp = zeros(hidden, {n}, ScalarType::Float), ent = zeros(hidden, {entropy ? n : 0}, ScalarType::Float);
  Tensor u = zeros(hidden, {direction ? n : 0, head.shape.hidden}, hidden.scalar_type());
  const HeadOutputs out{.logp = data(logp),
                        .entropy = entropy ? data(ent) : nullptr,
                        .direction = direction ? u.mutable_data_ptr() : nullptr};
  gpu_linear_logprob(runtime, head.shape, head.in, out, workspace);
  return {logp, ent, u};
}

std::tuple<Tensor, Tensor, Tensor> linear_logprob_backward(const Tensor& hidden, const Tensor& weight,
                                                           const Tensor& target, const OptionalTensor& bias,
                                                           const OptionalTensor& token_temperature, double temperature,
                                                           double softcap, double logit_scale, const Tensor& logp_grad,
                                                           const OptionalTensor& entropy_grad, bool need_hidden,
                                                           bool need_weight, bool need_bias, int64_t workspace) {
  CudaRuntime runtime(hidden);
  const Head head = head_of(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale);
  const auto [n, h, v] = head.shape;
  Tensor dhidden = zeros(hidden, {need_hidden ? n : 0, h}, hidden.scalar_type());
  Tensor dweight = zeros(hidden, {need_weight ? v : 0, h}, ScalarType::Float);
  Tensor dbias = zeros(hidden, {need_bias ? v : 0}, ScalarType::Float);
  const HeadOutputs out{.direction = need_hidden ? dhidden.mutable_data_ptr() : nullptr,
                        .dweight = need_weight ? data(dweight) : nullptr,
                        .dbias = need_bias ? data(dbias) : nullptr};
  gpu_linear_logprob_backward(runtime, head.shape, head.in, out, read(logp_grad), pointer(entropy_grad), workspace);
  return {dhidden, dweight, dbias};
}

struct LossResult {
  Tensor loss, metrics;

  explicit LossResult(const Tensor& like)
      : loss(zeros(like, {}, ScalarType::Float)),
        metrics(zeros(like, {int64_t(sizeof(LossMetrics) / sizeof(float))}, ScalarType::Float)) {}
  LossOutputs outputs() const { return {data(loss), reinterpret_cast<LossMetrics*>(data(metrics))}; }
};

Sequences sequences_of(const OptionalTensor& cu_seqlens) {
  return {pointer<int32_t>(cu_seqlens), cu_seqlens ? cu_seqlens->numel() - 1 : 0};
}

std::tuple<Tensor, Tensor, Tensor> token_loss(const Tensor& logp, const Tensor& token_weight, const Tensor& advantages,
                                              const OptionalTensor& old_logp, const OptionalTensor& ref_logp,
                                              const OptionalTensor& importance, const OptionalTensor& cu_seqlens,
                                              const OptionalTensor& entropy, const std::vector<int64_t>& options,
                                              const std::vector<double>& constants) {
  CudaRuntime runtime(logp);
  const TokenBatch batch = token_batch(token_weight, advantages, old_logp, ref_logp, importance);
  Tensor gradient = zeros(logp, {batch.tokens}, ScalarType::Float);
  const LossResult result(logp);
  gpu_token_loss(runtime, loss_config(options, constants), batch, sequences_of(cu_seqlens), read(logp),
                 pointer(entropy), nullptr, data(gradient), result.outputs());
  return {result.loss, result.metrics, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_grpo_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    const OptionalTensor& token_temperature, double temperature, double softcap, double logit_scale,
    const Tensor& token_weight, const Tensor& advantages, const OptionalTensor& old_logp,
    const OptionalTensor& ref_logp, const OptionalTensor& importance, const OptionalTensor& cu_seqlens,
    const OptionalTensor& ref_hidden, const OptionalTensor& ref_weight, const std::vector<int64_t>& options,
    const std::vector<double>& constants, bool need_hidden, bool need_weight, bool need_bias, bool metrics,
    int64_t workspace, int64_t active) {
  CudaRuntime runtime(hidden);
  const LossConfig config = loss_config(options, constants);
  Head head = head_of(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale);
  head.in.exact_kl = exact_kl_of(config);
  head.in.reference_hidden = ref_hidden ? ref_hidden->const_data_ptr() : nullptr;
  head.in.reference_weight = ref_weight ? ref_weight->const_data_ptr() : head.in.weight;
  const auto [n, h, v] = head.shape;
  Tensor direction = zeros(hidden, {need_hidden ? n : 0, h}, hidden.scalar_type());
  Tensor scale = zeros(hidden, {need_hidden ? n : 0}, ScalarType::Float);
  Tensor dweight = zeros(hidden, {need_weight ? v : 0, h}, ScalarType::Float);
  Tensor dbias = zeros(hidden, {need_bias ? v : 0}, ScalarType::Float);
  const HeadOutputs gradients{.direction = need_hidden ? direction.mutable_data_ptr() : nullptr,
                              .scale = need_hidden ? data(scale) : nullptr,
                              .dweight = need_weight ? data(dweight) : nullptr,
                              .dbias = need_bias ? data(dbias) : nullptr};
  const LossResult result(hidden);
  GpuFusedLoss<CudaRuntime>(runtime, config, head.shape, head.in,
                            token_batch(token_weight, advantages, old_logp, ref_logp, importance),
                            sequences_of(cu_seqlens), gradients, active < 0 ? n : active, metrics, workspace)
      .run(result.outputs());
  return {result.loss, result.metrics, direction, scale, dweight, dbias};
}

void scale_rows_into(const Tensor& x, const Tensor& scale, const Tensor& out) {
  const CudaRuntime runtime(x);
  const Dtype dtype = dtype_of(x);
  launch_scale_rows(x.const_data_ptr(), dtype, out.mutable_data_ptr(), dtype, read(scale), x.size(0), x.size(1),
                    runtime.stream());
}

void scale_rows_(const Tensor& x, const Tensor& scale) { scale_rows_into(x, scale, x); }

Tensor scale_rows(const Tensor& x, const Tensor& scale) {
  Tensor out = torch::stable::empty_like(x);
  scale_rows_into(x, scale, out);
  return out;
}

}  // namespace
}  // namespace longgrpo

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CUDA, m) {
  m.impl("linear_logprob", TORCH_BOX(&longgrpo::linear_logprob));
  m.impl("linear_logprob_backward", TORCH_BOX(&longgrpo::linear_logprob_backward));
  m.impl("token_loss", TORCH_BOX(&longgrpo::token_loss));
  m.impl("linear_grpo_loss", TORCH_BOX(&longgrpo::linear_grpo_loss));
  m.impl("scale_rows", TORCH_BOX(&longgrpo::scale_rows));
  m.impl("scale_rows_", TORCH_BOX(&longgrpo::scale_rows_));
}
