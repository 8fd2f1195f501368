// From the ops' arguments to plain structs, the same on every device.
#pragma once

#include <optional>
#include <vector>

#include "../head/sweeps.h"
#include "../head/types.h"
#include "torch_runtime.h"

namespace longgrpo {

using OptionalTensor = std::optional<Tensor>;

template <class T = float>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "longgrpo takes float32, bfloat16 and float16 tensors");
  }
}

inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

inline LossConfig loss_config(const std::vector<int64_t>& options, const std::vector<double>& constants) {
  STD_TORCH_CHECK(options.size() == 5 && constants.size() == 11, "longgrpo: a loss has 5 options and 11 constants");
  const auto f = [&](int i) { return float(constants[i]); };
  return {LossType(options[0]),
          Kl(options[1]),
          options[2] != 0,
          options[3] != 0,
          options[4] != 0,
          f(0),
          f(1),
          f(2),
          f(3),
          f(4),
          f(5),
          f(6),
          f(7),
          f(8),
          f(9),
          f(10)};
}

inline ExactKl exact_kl_of(const LossConfig& config) {
  if (!config.has_exact_kl()) return ExactKl::none;
  return config.kl == Kl::exact_reverse ? ExactKl::reverse : ExactKl::forward;
}

inline const float* read(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

inline float* data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline TokenBatch token_batch(const Tensor& token_weight, const Tensor& advantages, const OptionalTensor& old_logp,
                              const OptionalTensor& ref_logp, const OptionalTensor& importance) {
  return {token_weight.numel(), read(token_weight), read(advantages),
          pointer(old_logp),    pointer(ref_logp),  pointer(importance)};
}

inline Sequences sequences_of(const OptionalTensor& cu_seqlens) {
  return {pointer<int32_t>(cu_seqlens), cu_seqlens ? cu_seqlens->numel() - 1 : 0};
}

}  // namespace longgrpo
