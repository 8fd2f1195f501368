// From the ops' arguments to plain structs, the same on every device.
#pragma once

#include <optional>
#include <vector>

#include "../head/row_loss.h"
#include "../head/sweeps.h"
#include "box.h"
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
  STD_TORCH_CHECK(options.size() == kOptions && constants.size() == kConstants, "longgrpo: a loss has ", kOptions,
                  " options and ", kConstants, " constants");
  return unpack_config(options, constants);
}

inline const float* read(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

inline float* data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline TokenBatch token_batch(const Tensor& token_weight, const Tensor& advantages, const OptionalTensor& old_logp,
                              const OptionalTensor& ref_logp, const OptionalTensor& importance,
                              const OptionalTensor& sampling_logp) {
  return {token_weight.numel(), read(token_weight),  read(advantages),      pointer(old_logp),
          pointer(ref_logp),    pointer(importance), pointer(sampling_logp)};
}

inline Sequences sequences_of(const OptionalTensor& cu_seqlens) {
  return {pointer<int32_t>(cu_seqlens), cu_seqlens ? cu_seqlens->numel() - 1 : 0};
}

}  // namespace longgrpo
