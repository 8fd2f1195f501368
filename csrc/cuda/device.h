// The one place that knows CUDA from the simulator (tests/native/kernels/simulator.h). Kernels are written against:
//   KERNEL(threads) name(Parameters p)   a kernel that is launched with at most so many threads a block
//   KERNEL(threads, blocks) name(...)    the same, with registers for so many blocks a multiprocessor
//   DEVICE                                    a device function
//   SHARED(T[n], name)                        static shared memory, not initialized
//   DYNAMIC_SHARED(T, name)                   T* to the launch's dynamic shared memory
//   launch(name, kernel, grid, block, shared bytes, stream, parameters...)
//   threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, __syncthreads, __syncthreads_or,
//   __shfl_xor_sync
//   exp2_fast(x), product(a, b)               a product that no compiler makes part of a multiply-add
#pragma once

#include <cstddef>

#include "chip.h"

namespace longgrpo {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

}  // namespace longgrpo

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define DEVICE __device__ __forceinline__
// Bytes, because a type with initializers may not be __shared__.
#define SHARED(type, name)                                           \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(type)]; \
  auto& name = reinterpret_cast<std::type_identity_t<type>&>(name##_bytes)
#define DYNAMIC_SHARED(type, name)                                       \
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_memory)

namespace longgrpo {

// 2^x within 2 ulp, one instruction; results below 2^-126 are 0.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float product(float a, float b) { return __fmul_rn(a, b); }

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("longgrpo: ") + what + ": " + cudaGetErrorString(error));
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t grid, int block, int64_t shared, Stream stream, A... a) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
  kernel<<<unsigned(grid), unsigned(block), size_t(shared), static_cast<cudaStream_t>(stream)>>>(P(a)...);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace longgrpo

#else
#include "simulator.h"
#endif
