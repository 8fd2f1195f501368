#include <cuda_runtime.h>

#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_backend.h"

namespace longgrpo::offload {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("offload: ") + what + ": " + cudaGetErrorString(error));
}

struct DeviceGuard {
  explicit DeviceGuard(int device) : wanted(device) {
    cudaGetDevice(&before);
    if (before != wanted) check(cudaSetDevice(wanted), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before != wanted) cudaSetDevice(before);
  }
  int wanted, before = 0;
};

class Events : public std::enable_shared_from_this<Events> {
 public:
  explicit Events(unsigned flags) : flags_(flags) {}
  ~Events() {
    for (auto event : free_) cudaEventDestroy(event);
  }

  // Goes back to the pool when its last holder lets go; an event may be recorded again while others still wait for its
  // past.
  Event get() {
    std::lock_guard lock(mutex_);
    cudaEvent_t event;
    if (free_.empty()) {
      check(cudaEventCreateWithFlags(&event, flags_), "cudaEventCreate");
    } else {
      event = free_.back();
      free_.pop_back();
    }
    return {event, [self = shared_from_this()](void* e) {
              std::lock_guard lock(self->mutex_);
              self->free_.push_back(static_cast<cudaEvent_t>(e));
            }};
  }

 private:
  unsigned flags_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_;
};

cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(const Event& event) { return static_cast<cudaEvent_t>(event.get()); }

class CudaBackend : public Backend {
 public:
  CudaBackend(int device, std::function<Stream()> compute) : device_(device), compute_(std::move(compute)) {
    DeviceGuard guard(device_);
    for (auto& lane : lanes_) check(cudaStreamCreateWithFlags(&lane, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~CudaBackend() override {
    drain();
    for (auto lane : lanes_) cudaStreamDestroy(lane);
  }

  Stream compute() override { return compute_(); }
  Stream lane(Lane lane) override { return lanes_[int(lane)]; }

  Event record(Stream stream) override { return record(stream, *order_); }

  void wait(Stream stream, const Event& event, Clock stall) override {
    if (done(event)) return;
    DeviceGuard guard(device_);
    Event begin = stall ? record(stream, *clocks_) : nullptr;
    check(cudaStreamWaitEvent(stream_of(stream), event_of(event)), "cudaStreamWaitEvent");
    if (stall) measure(stream, std::move(begin), stall);
  }

  bool done(const Event& event) override {
    if (!event) return true;
    cudaError_t status = cudaEventQuery(event_of(event));
    if (status != cudaErrorNotReady) check(status, "cudaEventQuery");
    return status == cudaSuccess;
  }

  void block(const Event& event) override {
    if (event) check(cudaEventSynchronize(event_of(event)), "cudaEventSynchronize");
  }

  void drain() noexcept override {
    for (auto lane : lanes_) cudaStreamSynchronize(lane);
  }

  void copy(Stream stream, void* to, const void* from, size_t bytes) override {
    DeviceGuard guard(device_);
    Event begin = record(stream, *clocks_);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(stream)), "cudaMemcpyAsync");
    measure(stream, std::move(begin), stream == lanes_[int(Lane::out)] ? &Times::copy_out : &Times::copy_in);
  }

  void host_copy(Stream stream, void* to, const void* from, size_t bytes) override {
    struct Copy {
      void* to;
      const void* from;
      size_t bytes;
    };
    auto run = [](void* p) {
      auto* copy = static_cast<Copy*>(p);
      std::memcpy(copy->to, copy->from, copy->bytes);
      delete copy;
    };
    check(cudaLaunchHostFunc(stream_of(stream), run, new Copy{to, from, bytes}), "cudaLaunchHostFunc");
  }

  std::shared_ptr<void> device_alloc(size_t bytes) override {
    DeviceGuard guard(device_);
    void* p = nullptr;
    if (cudaMalloc(&p, bytes) == cudaSuccess) return {p, [](void* q) { cudaFree(q); }};
    cudaGetLastError();
    return nullptr;
  }

  bool pin(void* p, size_t bytes) override {
    DeviceGuard guard(device_);
    if (cudaHostRegister(p, bytes, cudaHostRegisterPortable) == cudaSuccess) return true;
    cudaGetLastError();  // or torch's next check would report it as its own
    return false;
  }
  void unpin(void* p) override { cudaHostUnregister(p); }

  bool unified() const override {
    int integrated = 0;
    cudaDeviceGetAttribute(&integrated, cudaDevAttrIntegrated, device_);
    return integrated != 0;
  }

  Times times() override {
    std::lock_guard lock(mutex_);
    harvest();
    return times_;
  }

 private:
  struct Span {
    Event begin, end;
    Clock total;
  };

  Event record(Stream stream, Events& pool) {
    DeviceGuard guard(device_);
    Event event = pool.get();
    check(cudaEventRecord(event_of(event), stream_of(stream)), "cudaEventRecord");
    return event;
  }

  // The span since `begin` on the stream: known only once the device has run it.
  void measure(Stream stream, Event begin, Clock total) {
    Event end = record(stream, *clocks_);
    std::lock_guard lock(mutex_);
    spans_.push_back({std::move(begin), std::move(end), total});
    harvest();
  }

  void harvest() {
    for (float ms; !spans_.empty(); spans_.pop_front()) {
      auto& [begin, end, total] = spans_.front();
      if (cudaEventQuery(event_of(end)) != cudaSuccess) return;
      if (cudaEventElapsedTime(&ms, event_of(begin), event_of(end)) == cudaSuccess) times_.*total += int64_t(ms * 1e6);
    }
  }

  int device_;
  std::function<Stream()> compute_;
  cudaStream_t lanes_[2] = {};
  std::shared_ptr<Events> order_ = std::make_shared<Events>(cudaEventDisableTiming);
  std::shared_ptr<Events> clocks_ = std::make_shared<Events>(cudaEventDefault);
  std::mutex mutex_;
  std::deque<Span> spans_;
  Times times_;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(int device, std::function<Stream()> compute) {
  return std::make_unique<CudaBackend>(device, std::move(compute));
}

}  // namespace longgrpo::offload
