#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

longgrpo::sim::Index threadIdx, blockIdx, blockDim, gridDim;

// Saves the registers that a call keeps, goes to the other stack, restores its.
#if defined(__x86_64__)
extern "C" void sim_switch(void** save, void* to);
asm(R"(
.globl sim_switch
.type sim_switch, @function
sim_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
#else
#error "the simulator switches stacks only on x86-64"
#endif

namespace longgrpo::sim {

Schedule schedule = Schedule::forward;
uint64_t launches = 0;
std::set<std::string> launched;

namespace {

constexpr size_t kStack = 64 << 10, kStagger = 192;  // staggered: stacks a power of two apart share cache lines
constexpr int kMaxThreads = 1024;

enum class State { ready, at_barrier, at_exchange, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  void* stack_pointer;
  State state;
  int line;
  unsigned mask;
  Act act;
  void* argument;
  int groups;                     // of copies, closed so far
  std::vector<Copy> copies;       // on their way
  std::vector<uintptr_t> stores;  // 16 bytes of shared memory each, since the last barrier
};

struct Block {
  const char* name;
  const std::function<void()>* body;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> shared;
  std::unique_ptr<char[]> dynamic;
  int current;
  void* scheduler;
  std::vector<int> order;
  bool vote, voted;  // of the barrier that fills, and of the last one
};

Block block;
std::mt19937 random_order(0);

std::string where(int thread) {
  return std::string(block.name) + ", block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread);
}

char* stacks() {
  static char* const memory = static_cast<char*>(
      mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

void start_switch([[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, bottom, size);
#endif
}

void finish_switch([[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, bottom, size);
#endif
}

const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;

void yield(State state) {
  Fiber& self = block.fibers[size_t(block.current)];
  self.state = state;
  start_switch(scheduler_bottom, scheduler_size);
  sim_switch(&self.stack_pointer, block.scheduler);
  finish_switch(nullptr, nullptr);
}

void enter() {
  finish_switch(&scheduler_bottom, &scheduler_size);
  (*block.body)();
  yield(State::done);
}

void create(Fiber& fiber, int thread) {
  char* top = stacks() + kStack * size_t(thread + 1) - kStagger * size_t(thread % 16);
  void** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 1;
  *--frame = reinterpret_cast<void*>(&enter);  // returned into, as if it had been called: 16-byte alignment is off by 8
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
  fiber = {frame, State::ready, 0, 0, nullptr, nullptr, 0, {}, {}};
}

void resume(int thread) {
  block.current = thread;
  threadIdx.x = unsigned(thread);
  start_switch(stacks() + kStack * size_t(thread), kStack);
  sim_switch(&block.scheduler, block.fibers[size_t(thread)].stack_pointer);
  finish_switch(nullptr, nullptr);
}

template <class Integer>
void arrange(std::vector<Integer>& order, size_t n) {
  order.resize(n);
  std::iota(order.begin(), order.end(), Integer(0));
  if (schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random_order);
}

// The k-th store of each of eight lanes since the last barrier is one instruction.
void count_stores() {
  for (size_t first = 0; first < block.fibers.size(); first += 8) {
    for (size_t k = 0;; ++k) {
      uintptr_t at[8];
      int n = 0;
      for (size_t i = first; i < std::min(first + 8, block.fibers.size()); ++i)
        if (k < block.fibers[i].stores.size()) at[n++] = block.fibers[i].stores[k];
      if (n == 0) break;
      count_banks(at, n);
    }
  }
  for (Fiber& fiber : block.fibers) fiber.stores.clear();
}

// Whether a warp had all the lanes of an operation together.
bool act_together(int first) {
  const int count = std::min(kWarp, int(block.fibers.size()) - first);
  Fiber* const lanes = block.fibers.data() + first;
  bool any = false;
  for (int i = 0; i < count; ++i) {
    if (lanes[i].state != State::at_exchange) continue;
    const Fiber& mine = lanes[i];
    if (count < kWarp && (mine.mask >> count) != 0)
      throw std::runtime_error(where(first + i) + ": the mask names lanes that are not there");
    if (!(mine.mask >> i & 1)) throw std::runtime_error(where(first + i) + ": the mask leaves out its own lane");
    bool complete = true;
    void* arguments[kWarp] = {};
    for (int k = 0; k < count; ++k) {
      if (!(mine.mask >> k & 1)) continue;
      complete &= lanes[k].state == State::at_exchange && lanes[k].mask == mine.mask && lanes[k].line == mine.line &&
                  lanes[k].act == mine.act;
      arguments[k] = lanes[k].argument;
    }
    if (!complete) continue;
    mine.act(arguments, count);
    for (int k = 0; k < count; ++k)
      if (arguments[k]) lanes[k].state = State::ready;
    any = true;
  }
  return any;
}

// All threads at one barrier go on. False: the block is done.
bool release_barrier() {
  count_stores();
  int waiting = 0, done = 0, stuck = -1;
  for (int i = 0; i < int(block.fibers.size()); ++i) {
    const Fiber& fiber = block.fibers[size_t(i)];
    waiting += fiber.state == State::at_barrier && fiber.line == block.fibers[0].line;
    done += fiber.state == State::done;
    if (fiber.state != State::done) stuck = i;
  }
  if (done == int(block.fibers.size())) return false;
  if (waiting != int(block.fibers.size()))
    throw std::runtime_error(where(stuck) + ": waits at line " + std::to_string(block.fibers[size_t(stuck)].line) +
                             " for threads that never come");
  for (Fiber& fiber : block.fibers) fiber.state = State::ready;
  block.voted = std::exchange(block.vote, false);
  return true;
}

// Every lane of a warp as far as it gets alone, and then what they do together. False: they wait for other warps.
bool run_warp(int first) {
  arrange(block.order, std::min(size_t(kWarp), block.fibers.size() - size_t(first)));
  for (int i : block.order)
    if (block.fibers[size_t(first + i)].state == State::ready) resume(first + i);
  return act_together(first);
}

void run_to_barrier() {
  std::vector<int> warps;
  arrange(warps, (block.fibers.size() + kWarp - 1) / kWarp);
  while (!warps.empty()) {
    const size_t next = schedule == Schedule::shuffled ? random_order() % warps.size() : 0;
    if (!run_warp(warps[next] * kWarp)) warps.erase(warps.begin() + ptrdiff_t(next));
  }
}

void run_block(int threads, int64_t shared) {
  block.shared.clear();
  block.vote = false;
  block.dynamic.reset(shared ? new char[size_t(shared)] : nullptr);
  if (shared) std::memset(block.dynamic.get(), 0xff, size_t(shared));  // NaN
  block.fibers.resize(size_t(threads));
  for (int i = 0; i < threads; ++i) create(block.fibers[size_t(i)], i);
  do run_to_barrier();
  while (release_barrier());
}

}  // namespace

int new_site() {
  static int sites = 0;
  return sites++;
}

void* shared_memory(int site, size_t bytes) {
  if (block.shared.size() <= size_t(site)) block.shared.resize(size_t(site) + 1);
  auto& memory = block.shared[size_t(site)];
  if (!memory) {
    memory.reset(new char[bytes]);  // exactly so many bytes: AddressSanitizer sees the end
    std::memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

void* dynamic_shared_memory() { return block.dynamic.get(); }

void barrier(int line) {
  block.fibers[size_t(block.current)].line = line;
  yield(State::at_barrier);
}

bool barrier_or(bool mine, int line) {
  block.vote |= mine;
  barrier(line);
  return block.voted;
}

void together(unsigned mask, Act act, void* argument, int line) {
  Fiber& self = block.fibers[size_t(block.current)];
  self.mask = mask, self.act = act, self.argument = argument, self.line = line;
  yield(State::at_exchange);
}

void copy_async(void* to, const void* from, int bytes) {
  Fiber& self = block.fibers[size_t(block.current)];
  std::memset(to, 0xff, 16);
  self.copies.push_back({to, from, bytes, self.groups});
  self.stores.push_back(reinterpret_cast<uintptr_t>(to));
}

void commit_copies() { ++block.fibers[size_t(block.current)].groups; }

void wait_copies(int groups) {
  Fiber& self = block.fibers[size_t(block.current)];
  const auto lands = [&](const Copy& copy) { return copy.group < self.groups - groups; };
  for (const Copy& copy : self.copies) {
    if (!lands(copy)) continue;
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  }
  std::erase_if(self.copies, lands);
}

void store_shared(void* to, const void* from) {
  std::memcpy(to, from, 16);
  block.fibers[size_t(block.current)].stores.push_back(reinterpret_cast<uintptr_t>(to));
}

void run(const char* name, int64_t grid, int threads, int64_t shared, const std::function<void()>& body) {
  if (grid < 1 || grid > 0x7fffffff || threads < 1 || threads > kMaxThreads || shared > use_device(0).shared_memory)
    throw std::runtime_error(std::string(name) + ": no card takes this launch");
  ++launches;
  launched.insert(name);
  block.name = name;
  block.body = &body;
  gridDim.x = unsigned(grid), blockDim.x = unsigned(threads);
  std::vector<int64_t> blocks;
  arrange(blocks, size_t(grid));
  for (int64_t b : blocks) {
    blockIdx.x = unsigned(b);
    run_block(threads, shared);
  }
}

}  // namespace longgrpo::sim
