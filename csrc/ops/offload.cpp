// The offload engine as dispatcher ops on an int64 handle. A tensor goes in by pack and comes out by unpack with the
// size, stride and dtype its caller remembers; what lies between is bytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <mutex>
#include <string>
#include <unordered_map>

#include "../offload/counting_backend.h"
#include "../offload/engine.h"
#include "../offload/host_backend.h"
#include "box.h"

STABLE_TORCH_LIBRARY_FRAGMENT(longgrpo, m) {
  // A backend is a pointer that offload_new takes over; offload_cuda_backend comes with the CUDA library.
  m.def("offload_host_backend(str schedule, int seed, bool poison) -> int");
  m.def("offload_count_backend() -> int");
  m.def("offload_new(int backend, int host_bytes, int[] depths, str on_full, Device device) -> int");
  m.def("offload_unified(int engine) -> bool");
  m.def("offload_free(int engine) -> ()");
  m.def("offload_pack(int engine, Tensor source, int group) -> int");
  m.def("offload_unpack(int engine, int record, int[] size, int[] stride, ScalarType dtype, Device device) -> Tensor");
  m.def("offload_drop(int engine, int record) -> ()");
  m.def("offload_sync(int engine) -> ()");
  m.def("offload_stats(int engine) -> int[]");
  m.def("offload_host_budget() -> int");
}

namespace longgrpo::offload {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

// Never destroyed: at exit the CUDA runtime may be gone before an engine that nobody closed.
std::mutex& registry_mutex = *new std::mutex;
std::unordered_map<int64_t, std::shared_ptr<Engine>>& registry =
    *new std::unordered_map<int64_t, std::shared_ptr<Engine>>;

std::shared_ptr<Engine> find(int64_t handle) {
  std::lock_guard lock(registry_mutex);
  auto it = registry.find(handle);
  STD_TORCH_CHECK(it != registry.end(), "there is no offload engine ", handle, ": it was closed");
  return it->second;
}

int64_t host_backend(std::string schedule, int64_t seed, bool poison) {
  Schedule s = schedule == "threaded" ? Schedule::threaded : schedule == "lazy" ? Schedule::lazy : Schedule::seeded;
  return reinterpret_cast<int64_t>(static_cast<Backend*>(new HostBackend(s, seed, poison)));
}

int64_t count_backend() { return reinterpret_cast<int64_t>(static_cast<Backend*>(new CountingBackend)); }

struct TorchMemory {  // what keeps memory of torch_alloc
  Tensor bytes;
  void operator()(void*) const {}
};

// From torch's own allocator, so that it competes with nothing, is seen by its statistics, and is taken back only after
// the streams that record_stream names.
std::shared_ptr<void> torch_alloc(size_t bytes, Device device) try {
  auto memory = torch::stable::empty({int64_t(bytes)}, ScalarType::Byte, std::nullopt, device);
  return {memory.data_ptr(), TorchMemory{memory}};
} catch (const std::exception&) {
  return nullptr;
}

int64_t create(int64_t backend, int64_t host_bytes, std::vector<int64_t> depths, std::string on_full, Device device) {
  std::unique_ptr<Backend> owned(reinterpret_cast<Backend*>(backend));
  Options options{size_t(host_bytes), int(depths.at(0)), int(depths.at(1)), int(depths.at(2)),
                  on_full == "raise"      ? OnFull::raise
                  : on_full == "pageable" ? OnFull::pageable
                                          : OnFull::keep};
  Engine::DeviceAlloc alloc;
  if (owned->touches_memory()) alloc = [device](size_t bytes) { return torch_alloc(bytes, device); };
  auto engine = std::make_shared<Engine>(std::move(owned), options, std::move(alloc));
  std::lock_guard lock(registry_mutex);
  static int64_t next = 0;
  registry[++next] = engine;
  return next;
}

bool unified(int64_t engine) { return find(engine)->backend().unified(); }

void destroy(int64_t handle) {
  std::shared_ptr<Engine> last;
  std::lock_guard lock(registry_mutex);
  if (auto it = registry.find(handle); it != registry.end()) last = std::move(it->second), registry.erase(it);
}

// Bytes from the first to the last element: exact for dense tensors and broadcasts, with the gaps for others.
size_t span(const Tensor& t) {
  if (t.numel() == 0) return 0;
  size_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * t.element_size();
}

int64_t pack(int64_t engine, const Tensor& source, int64_t group) {
  auto owner = std::make_shared<Tensor>(source);
  return find(engine)->pack(source.data_ptr(), span(source), owner, group);
}

using torch::stable::detail::from;

// Calls an op of ATen; the first of `arguments` is replaced by what it returns.
template <size_t n>
Tensor call(const char* op, const char* overload, std::array<StableIValue, n> arguments) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

Tensor empty_strided(const std::vector<int64_t>& size, const std::vector<int64_t>& stride, ScalarType dtype,
                     Device device) {
  return call<6>("aten::empty_strided", "",
                 {from(size), from(stride), from(std::optional(dtype)), from(std::nullopt), from(std::optional(device)),
                  from(std::nullopt)});
}

// The bytes as a tensor of this size, stride and dtype. It shares their storage, and so torch's allocator knows it.
Tensor as_tensor(const Tensor& bytes, const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
                 ScalarType dtype) {
  const Tensor typed = call<2>("aten::view", "dtype", {from(bytes), from(dtype)});
  return call<4>("aten::as_strided", "", {from(typed), from(size), from(stride), from(std::nullopt)});
}

Tensor unpack(int64_t handle, int64_t record, std::vector<int64_t> size, std::vector<int64_t> stride, ScalarType dtype,
              Device device) {
  auto engine = find(handle);
  Loan loan = engine->unpack(record);
  if (loan.is_source) return *std::static_pointer_cast<Tensor>(loan.owner);
  if (!engine->backend().touches_memory()) return empty_strided(size, stride, dtype, device);
  return as_tensor(std::get_deleter<TorchMemory>(loan.owner)->bytes, size, stride, dtype);
}

void drop(int64_t engine, int64_t record) { find(engine)->drop(record); }
void sync(int64_t engine) { find(engine)->sync(); }

std::vector<int64_t> stats(int64_t engine) {
  Stats s = find(engine)->stats();
  return {s.packs,          s.bytes_out,   s.bytes_in,         s.resident,         s.hits,        s.misses,
          s.keeps,          s.pageable,    s.records,          s.allocations,      s.host_live,   s.host_peak,
          s.host_committed, s.host_pinned, s.host_budget,      s.device_live,      s.device_peak, s.prefetch,
          s.copy_out_ns,    s.copy_in_ns,  s.stall_forward_ns, s.stall_backward_ns};
}

int64_t budget() { return int64_t(host_budget()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CompositeExplicitAutograd, m) {
  m.impl("offload_host_backend", LONGGRPO_BOX(&host_backend));
  m.impl("offload_count_backend", LONGGRPO_BOX(&count_backend));
  m.impl("offload_new", LONGGRPO_BOX(&create));
  m.impl("offload_unified", LONGGRPO_BOX(&unified));
  m.impl("offload_free", LONGGRPO_BOX(&destroy));
  m.impl("offload_pack", LONGGRPO_BOX(&pack));
  m.impl("offload_unpack", LONGGRPO_BOX(&unpack));
  m.impl("offload_drop", LONGGRPO_BOX(&drop));
  m.impl("offload_sync", LONGGRPO_BOX(&sync));
  m.impl("offload_stats", LONGGRPO_BOX(&stats));
  m.impl("offload_host_budget", LONGGRPO_BOX(&budget));
}

}  // namespace longgrpo::offload
