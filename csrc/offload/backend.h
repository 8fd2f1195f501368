// What the offload engine asks of a device: streams, events, copies, pinned memory. CUDA, host and counting
// implementations follow; the engine itself knows none of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace longgrpo::offload {

using Stream = void*;
using Event = std::shared_ptr<void>;  // null: complete

enum class Lane { out, in };  // out: device -> host, in: host -> device

struct Times {                                    // nanoseconds
  int64_t copy_out = 0, copy_in = 0;              // the lanes' busy time
  int64_t stall_forward = 0, stall_backward = 0;  // compute waited for a copy out, for a copy in
};

using Clock = int64_t Times::*;

// Thread safe. Work on one stream runs in order; two streams are ordered only by record and wait.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual Stream compute() = 0;  // the caller's current stream, asked for at every call
  virtual Stream lane(Lane) = 0;

  virtual Event record(Stream) = 0;
  // Later work on the stream runs after the event; the time the stream stands still for it is added to `stall`.
  virtual void wait(Stream, const Event&, Clock stall = nullptr) = 0;
  virtual bool done(const Event&) = 0;
  virtual void block(const Event&) = 0;  // the calling thread waits
  virtual void drain() noexcept = 0;     // the calling thread waits until both lanes are empty

  virtual void copy(Stream, void* to, const void* from, size_t bytes) = 0;
  virtual void host_copy(Stream, void* to, const void* from, size_t bytes) = 0;  // both sides in host memory
  // Under test: overwrites what is handed out, so that a read before its write shows.
  virtual void poison(Stream, void*, size_t) {}

  virtual std::shared_ptr<void> device_alloc(size_t bytes) = 0;  // null: out of memory
  virtual bool pin(void*, size_t bytes) = 0;                     // false: refused, and no error is left behind
  virtual void unpin(void*) = 0;

  virtual bool unified() const { return false; }        // the device uses host memory: offload gains nothing
  virtual bool touches_memory() const { return true; }  // false: a dry run that counts
  virtual Times times() { return {}; }
};

}  // namespace longgrpo::offload
