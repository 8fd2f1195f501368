// The few functions of cuBLAS that the benchmark calls, found at run time: torch brings the library, not its headers.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/cuda_head.h"

namespace bench {

class Cublas {
 public:
  explicit Cublas(const std::string& library) : library_(dlopen(library.c_str(), RTLD_NOW)) {
    if (!library_) throw std::runtime_error(std::string("no cuBLAS (--cublas PATH): ") + dlerror());
    const auto create = find<int (*)(void**)>("cublasCreate_v2");
    gemm_ = find<decltype(gemm_)>("cublasGemmEx");
    if (create(&handle_) != 0) throw std::runtime_error("cublasCreate failed");
  }

  // c [rows, columns] fp32 = a b, row-major: to cuBLAS, which is column-major, c^T = b^T a^T.
  void gemm(const longgrpo::Operand& a, const longgrpo::Operand& b, float* c, int64_t c_stride) const {
    constexpr int kCompute32F = 68, kDefaultAlgorithm = -1;
    const float one = 1, zero = 0;
    const int status = gemm_(handle_, transposed(b), transposed(a), int(b.columns), int(a.rows), int(a.columns), &one,
                             b.data, type(b.dtype), stride(b), a.data, type(a.dtype), stride(a), &zero, c,
                             type(longgrpo::Dtype::f32), int(c_stride), kCompute32F, kDefaultAlgorithm);
    if (status != 0) throw std::runtime_error("cublasGemmEx failed with status " + std::to_string(status));
  }

 private:
  template <class F>
  F find(const char* name) const {
    void* const symbol = dlsym(library_, name);
    if (!symbol) throw std::runtime_error(std::string("cuBLAS has no ") + name);
    return reinterpret_cast<F>(symbol);
  }
  static int transposed(const longgrpo::Operand& m) { return m.column_stride == 1 ? 0 : 1; }
  static int stride(const longgrpo::Operand& m) { return int(m.column_stride == 1 ? m.row_stride : m.column_stride); }
  static int type(longgrpo::Dtype dtype) {
    return dtype == longgrpo::Dtype::f32 ? CUDA_R_32F : dtype == longgrpo::Dtype::bf16 ? CUDA_R_16BF : CUDA_R_16F;
  }

  void* library_;
  void* handle_ = nullptr;
  int (*gemm_)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
               void*, int, int, int, int) = nullptr;
};

}  // namespace bench
