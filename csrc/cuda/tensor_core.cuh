// The instructions of sm_80 and later that score.cu is made of. The simulator's twins are in
// tests/native/kernels/simulator.h; both follow the PTX ISA's layouts of fragments.
//   copy_async(to, from, bytes)   16 bytes of shared memory: `bytes` of them from global memory, 16 or 0, zeros after;
//                                 nobody may look before the wait
//   commit_copies()               closes a group of this thread's copies
//   wait_copies<n>()              all groups of this thread but the n latest have landed
//   store_shared(to, words)       16 bytes of shared memory at once
//   load_matrices(from, to)       ldmatrix.x4: lanes 8 m .. 8 m + 7 point at the rows of matrix m, 8 x 8 numbers;
//                                 to[m] has columns 2 (lane % 4) and the next of its row lane / 4
//   multiply_add(a, b, c, T)      mma.m16n8k16: c [16, 8] += a [16, 16] b [16, 8], of which a lane has
//                                   a[r] row lane / 4 + 8 (r % 2), columns 2 (lane % 4) + 8 (r / 2) and the next
//                                   b[r] rows 2 (lane % 4) + 8 r and the next, column lane / 4
//                                   c[r] row lane / 4 + 8 (r / 2), column 2 (lane % 4) + r % 2
#pragma once

#include "numbers.cuh"

namespace longgrpo {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;  // sm_75 has no bf16 and no cp.async: kernels are empty there, and never chosen
#else
constexpr bool kTensorCores = true;
#endif

#if defined(__CUDACC__)

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

DEVICE void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

DEVICE void store_shared(void* to, Words4 words) { *static_cast<Words4*>(to) = words; }

DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }

DEVICE void load_matrices(const void* from, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(from)));
}

DEVICE void multiply_add(const uint32_t (&a)[4], const uint32_t* b, float (&c)[4], Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void multiply_add(const uint32_t (&a)[4], const uint32_t* b, float (&c)[4], Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

using sim::commit_copies;
using sim::copy_async;
using sim::load_matrices;
template <int kGroups>
void wait_copies() {
  sim::wait_copies(kGroups);
}
inline void store_shared(void* to, Words4 words) { sim::store_shared(to, &words); }
inline void forget(int&) {}
template <class T>
void multiply_add(const uint32_t (&a)[4], const uint32_t* b, float (&c)[4], T) {
  float left[8], right[4];  // both numbers of a register
  for (int i = 0; i < 8; ++i) left[i] = widen(T{uint16_t(a[i / 2] >> i % 2 * 16)});
  for (int i = 0; i < 4; ++i) right[i] = widen(T{uint16_t(b[i / 2] >> i % 2 * 16)});
  sim::multiply_add(left, right, c);
}

#endif

}  // namespace longgrpo
