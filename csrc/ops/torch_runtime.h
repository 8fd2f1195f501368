// What the CPU head borrows from torch: its fp32 GEMM and its threads. Only files in this folder include torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "../cpu/head.h"

namespace longgrpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor as_tensor(const Matrix& m) {
  return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

struct TorchRuntime {
  void gemm(const Matrix& a, const Matrix& b, const Matrix& c) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(as_tensor(a)),
                                      torch::stable::detail::from(as_tensor(b)),
                                      torch::stable::detail::from(as_tensor(c))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference
  }

  int64_t threads() { return torch::stable::get_num_threads(); }

  template <class F>
  void parallel_for(int64_t n, F&& f) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
};

}  // namespace longgrpo
