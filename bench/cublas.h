// cuBLAS for the benchmark: a library of its own, and a handle.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/cublas.h"

namespace bench {

class Cublas {
 public:
  explicit Cublas(const std::string& library) : gemm_(open(library)) {
    const auto create = reinterpret_cast<int (*)(void**)>(dlsym(open(library), "cublasCreate_v2"));
    if (!create || create(&handle_) != 0) throw std::runtime_error("cublasCreate failed");
  }

  void gemm(const longgrpo::Operand& a, const longgrpo::Operand& b, float* c, int64_t c_stride, bool add) const {
    gemm_(handle_, a, b, c, c_stride, add);
  }

 private:
  static void* open(const std::string& library) {
    void* const opened = dlopen(library.c_str(), RTLD_NOW);
    if (!opened) throw std::runtime_error(std::string("no cuBLAS (--cublas PATH): ") + dlerror());
    return opened;
  }

  longgrpo::CublasGemm gemm_;
  void* handle_ = nullptr;
};

}  // namespace bench
