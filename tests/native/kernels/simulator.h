// CUDA on the CPU, for tests: a fiber for each CUDA thread, one block at a time. A fiber runs until it meets a barrier
// or a warp operation; the order in which fibers and blocks get their turn is the schedule, and no kernel may depend on
// it.
//
// Finds: a barrier or a warp operation that not all its threads reach, a mask that names threads that are not there,
// shared memory that is read before it is written (it starts as NaN), and, by schedules and AddressSanitizer, missing
// barriers and reads out of bounds. Cannot show: time, the memory model, the divergence of a warp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
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
extern uint64_t launches;  // so far

int new_site();
void* shared_memory(int site, size_t bytes);  // the block's own, the same for all its threads
void* dynamic_shared_memory();
void barrier(int line);
bool barrier_or(bool mine, int line);  // whether any thread came with true
// Hands in `value` and gets the value of lane (own ^ lane_mask), once all lanes of the mask are here, at this very
// line.
uint64_t exchange(unsigned mask, uint64_t value, int lane_mask, int line);
// Runs body() as every thread of every block. Throws std::runtime_error where threads wait for ever.
void run(const char* name, int64_t grid, int block, int64_t shared, const std::function<void()>& body);

}  // namespace longgrpo::sim

extern longgrpo::sim::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(int line = __builtin_LINE()) { longgrpo::sim::barrier(line); }

inline int __syncthreads_or(int mine, int line = __builtin_LINE()) { return longgrpo::sim::barrier_or(mine, line); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = longgrpo::sim::exchange(mask, bits, lane_mask, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace longgrpo {

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float product(float a, float b) { return a * b; }  // compiled with -ffp-contract=off

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t grid, int block, int64_t shared, Stream, A... a) {
  sim::run(name, grid, block, shared, [&] { kernel(P(a)...); });
}

}  // namespace longgrpo
