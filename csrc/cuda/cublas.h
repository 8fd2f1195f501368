// The one function of cuBLAS that is called from here, found at run time: torch brings the library, not its headers.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "operand.h"

namespace longgrpo {

class CublasGemm {
 public:
  // `library`: cuBLAS, or one that was linked to it.
  explicit CublasGemm(void* library) : gemm_ex_(reinterpret_cast<GemmEx>(dlsym(library, "cublasGemmEx"))) {
    if (!gemm_ex_) throw std::runtime_error("longgrpo: no cublasGemmEx in the cuBLAS of this process");
  }

  // c [rows, columns] fp32 = a b, or += a b, row-major: to cuBLAS, which is column-major, c^T = b^T a^T.
  void operator()(void* handle, const Operand& a, const Operand& b, float* c, int64_t c_stride, bool add) const {
    constexpr int kCompute32F = 68, kDefaultAlgorithm = -1;
    const float one = 1, beta = add ? 1 : 0;
    const int status = gemm_ex_(handle, transposed(b), transposed(a), int(b.columns), int(a.rows), int(a.columns), &one,
                                b.data, type(b.dtype), stride(b), a.data, type(a.dtype), stride(a), &beta, c,
                                type(Dtype::f32), int(c_stride), kCompute32F, kDefaultAlgorithm);
    if (status != 0) throw std::runtime_error("longgrpo: cublasGemmEx failed with status " + std::to_string(status));
  }

 private:
  using GemmEx = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                         const void*, void*, int, int, int, int);

  static int transposed(const Operand& m) { return m.column_stride == 1 ? 0 : 1; }
  static int stride(const Operand& m) { return int(m.column_stride == 1 ? m.row_stride : m.column_stride); }
  static int type(Dtype dtype) {
    constexpr int kR32F = 0, kR16F = 2, kR16BF = 14;  // cudaDataType
    return dtype == Dtype::f32 ? kR32F : dtype == Dtype::bf16 ? kR16BF : kR16F;
  }

  GemmEx gemm_ex_;
};

}  // namespace longgrpo
