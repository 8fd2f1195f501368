// Torch's memory and its GEMM, as both devices' runtimes lend them. Only files in this folder include torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <utility>

namespace longgrpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Memory of torch's allocator, freed with this.
class TorchScratch {
 public:
  explicit TorchScratch(Tensor memory) : memory_(std::move(memory)) {}
  void* data() const { return memory_.mutable_data_ptr(); }

 private:
  Tensor memory_;
};

// aten::mm's `overload` into the last of its arguments.
template <class... Arguments>
void torch_mm(const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference
}

}  // namespace longgrpo
