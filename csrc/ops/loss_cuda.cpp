// The loss ops on CUDA. On the current stream, without a wait for the device, with no memory but torch's; so it can be
// captured into a graph and runs on any device and stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include "../cuda/cublas.h"
#include "../cuda/cuda_head.h"
#include "../cuda/tiles.h"
#include "loss_ops.h"
#include "torch_runtime.h"

namespace longgrpo {
namespace {

ScalarType scalar_type_of(Dtype dtype) {
  return dtype == Dtype::f32 ? ScalarType::Float : dtype == Dtype::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

// c += a b by torch's own cuBLAS handle, with the current stream and torch's workspace and setting of TF32. The stable
// ABI can call neither addmm, which takes Scalars, nor anything else that adds to its output.
void add_product(const Operand& a, const Operand& b, float* c, int64_t c_stride) {
  static const CublasGemm gemm(dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY));  // linked to cuBLAS
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  gemm(handle, a, b, c, c_stride, true);
}

class CudaRuntime {
 public:
  explicit CudaRuntime(const Tensor& like)
      : like_(like), device_(like.device()), guard_(device_.index()), chip_(use_device(device_.index())) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream_));
  }

  Tensor zeros(std::vector<int64_t> size, ScalarType dtype) const {
    return torch::stable::new_zeros(like_, size, dtype);
  }
  // fp16 has not the range for the sum of a loss whose normalizer counts tokens.
  Tensor dweight(std::vector<int64_t> size, ScalarType weight) const {
    return zeros(size, weight == ScalarType::BFloat16 ? weight : ScalarType::Float);
  }
  TorchScratch scratch(int64_t bytes) const {
    return TorchScratch(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
  }

  CudaDevice<CudaRuntime> device(const HeadShape& shape, int64_t workspace, int64_t active) {
    return {*this, shape, workspace, active};
  }
  void check(const HeadInputs&, const HeadShape&) const {}

  const Chip& chip() const { return chip_; }
  Stream stream() const { return stream_; }
  CudaPlan plan(const CudaWish& wish, Tiling tiling, int64_t limit_bytes) const {
    return tiles().plan(wish, tiling, limit_bytes, chip_);
  }
  bool splits(const CudaWish& wish, int64_t limit_bytes, bool c_in_row) const {
    return tiles().splits(wish, limit_bytes, chip_, c_in_row);
  }
  static void choose(const HeadKey& head, const TileChoice& choice) { tiles().choose(head, choice); }
  std::optional<ScorePlan> score_plan(const HeadShape& shape, const HeadInputs& in, int64_t limit_bytes) const {
    return tiles().score_plan(shape, in, limit_bytes, chip_);
  }

  // fp32 operands follow torch's own setting of TF32 (off unless torch.backends.cuda.matmul.allow_tf32 says so).
  void gemm(const Operand& a, const Operand& b, float* c, int64_t c_stride, bool add) const {
    if (add) return add_product(a, b, c, c_stride);
    const Tensor out = view(c, Dtype::f32, a.rows, b.columns, c_stride, 1);
    const Tensor x = view(const_cast<void*>(a.data), a.dtype, a.rows, a.columns, a.row_stride, a.column_stride);
    const Tensor y = view(const_cast<void*>(b.data), b.dtype, b.rows, b.columns, b.row_stride, b.column_stride);
    if (a.dtype == Dtype::f32)
      torch_mm("out", x, y, out);
    else
      torch_mm("dtype_out", x, y, ScalarType::Float, out);
  }

 private:
  Tensor view(void* data, Dtype dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) const {
    return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride}, device_, scalar_type_of(dtype));
  }

  static Tiles& tiles() {
    static Tiles all;
    return all;
  }

  const Tensor like_;
  const torch::stable::Device device_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const Chip chip_;
  void* stream_ = nullptr;
};

using CudaOps = LossOps<CudaRuntime>;

}  // namespace
}  // namespace longgrpo

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CUDA, m) { LONGGRPO_REGISTER_LOSS_OPS(m, longgrpo::CudaOps); }
