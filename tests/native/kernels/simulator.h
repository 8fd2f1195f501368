// CUDA on the CPU, for tests: a fiber for each CUDA thread, one block at a time. A fiber runs until it meets a barrier
// or a warp operation; the order in which fibers and blocks get their turn is the schedule, and no kernel may depend on
// it: forward and reverse run one warp after the other, each as far as its next barrier, and shuffled lets any warp go
// on.
//
// Finds: a barrier or a warp operation that not all its threads reach, a mask that names threads that are not there,
// shared memory that is read before it is written (it starts as NaN), and, by schedules and AddressSanitizer, missing
// barriers and reads out of bounds. An asynchronous copy poisons its target and lands at the thread's own wait, so that
// a missing wait or barrier shows as NaN. Bank conflicts of ldmatrix and of 16-byte shared stores are counted, by eight
// lanes as the hardware does. A tensor core's sums of 16 products are exact here, and rounded once. Cannot show: time,
// the memory model, the divergence of a warp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <type_traits>

#define KERNEL(...) void
#define DEVICE inline
#define SHARED(type, name)                                  \
  static const int name##_site = longgrpo::sim::new_site(); \
  auto& name = *static_cast<std::type_identity_t<type>*>(longgrpo::sim::shared_memory(name##_site, sizeof(type)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(longgrpo::sim::dynamic_shared_memory())

namespace longgrpo::sim {

struct Index {
  unsigned x;
};

enum class Schedule { forward, reverse, shuffled };
extern Schedule schedule;
extern uint64_t launches;               // so far
extern std::set<std::string> launched;  // and of which kernels

int new_site();
void* shared_memory(int site, size_t bytes);  // the block's own, the same for all its threads
void* dynamic_shared_memory();
void barrier(int line);
bool barrier_or(bool mine, int line);  // whether any thread came with true
// act(lanes, count) once all lanes of the mask are here, at this very line: lanes[i] is what lane i handed in, null
// outside the mask, and `count` lanes are there. It may throw.
using Act = void (*)(void* const* lanes, int count);
void together(unsigned mask, Act act, void* argument, int line);
// Runs body() as every thread of every block. Throws std::runtime_error where threads wait for ever.
void run(const char* name, int64_t grid, int block, int64_t shared, const std::function<void()>& body);

// ---- cuda/tensor_core.cuh ----

struct SharedAccesses {
  uint64_t warps, conflicts;  // by eight lanes, and how many more times the banks were asked than once each
};
extern SharedAccesses shared_accesses;         // so far
void count_banks(const uintptr_t* at, int n);  // n <= 8 accesses of 16 bytes at once

void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int groups);
void store_shared(void* to, const void* from);
void load_matrices(const void* from, uint32_t (&to)[4], int line = __builtin_LINE());
void multiply_add(const float (&a)[8], const float (&b)[4], float (&c)[4], int line = __builtin_LINE());

}  // namespace longgrpo::sim

extern longgrpo::sim::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(int line = __builtin_LINE()) { longgrpo::sim::barrier(line); }

inline int __syncthreads_or(int mine, int line = __builtin_LINE()) { return longgrpo::sim::barrier_or(mine, line); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
  struct Exchange {
    T own, other;
    int lane_mask;
  } exchange{value, value, lane_mask};
  std::memset(&exchange.other, 0xff, sizeof value);  // a lane that is not there
  const auto act = [](void* const* lanes, int count) {
    for (int i = 0; i < count; ++i) {
      auto* const mine = static_cast<Exchange*>(lanes[i]);
      const int from = mine ? i ^ mine->lane_mask : count;
      if (from < count && lanes[from]) mine->other = static_cast<Exchange*>(lanes[from])->own;
    }
  };
  longgrpo::sim::together(mask, act, &exchange, line);
  return exchange.other;
}

namespace longgrpo {

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float product(float a, float b) { return a * b; }  // compiled with -ffp-contract=off

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t grid, int block, int64_t shared, Stream, A... a) {
  sim::run(name, grid, block, shared, [&] { kernel(P(a)...); });
}

}  // namespace longgrpo
