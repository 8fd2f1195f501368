// A device in host memory, for tests and for machines without one. Each lane is a queue; the schedule says when it
// runs:
//   threaded  a worker thread for each lane, in real time
//   lazy      nothing runs until something waits for it: the worst legal order, and a deterministic one
//   seeded    a random legal order, the same for the same seed and calls
// With poison all memory handed out is filled with NaN first, so that a missing order between two streams shows as one.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>

#include "backend.h"

namespace longgrpo::offload {

enum class Schedule { threaded, lazy, seeded };

class HostBackend : public Backend {
 public:
  // torch computes on the calling thread, so a null stream is that thread and its events are complete at once. Tests of
  // the core set async_compute and queue their compute work with run(), as a GPU would.
  explicit HostBackend(Schedule = Schedule::threaded, uint64_t seed = 0, bool poison = false,
                       bool async_compute = false);
  ~HostBackend() override;

  Stream compute() override { return async_compute_ ? &queues_[kCompute] : nullptr; }
  Stream lane(Lane lane) override { return &queues_[int(lane)]; }
  Stream side() { return &queues_[kSide]; }  // with async_compute: another stream that computes

  Event record(Stream) override;
  void wait(Stream, const Event&, Clock stall = nullptr) override;
  bool done(const Event&) override;
  void block(const Event&) override;
  void drain() noexcept override;

  void copy(Stream, void* to, const void* from, size_t bytes) override;
  void host_copy(Stream stream, void* to, const void* from, size_t bytes) override { copy(stream, to, from, bytes); }
  void poison(Stream, void*, size_t) override;
  void run(Stream, std::function<void()>);

  std::shared_ptr<void> device_alloc(size_t bytes) override;
  bool pin(void*, size_t) override { return true; }
  void unpin(void*) override {}
  Times times() override;

 private:
  enum { kOut, kIn, kCompute, kSide, kQueues };
  struct Queue;
  struct Mark {  // what an Event points to
    Queue* queue;
    bool done = false;
  };
  struct Task {
    std::shared_ptr<Mark> wait, mark;  // wait: runs after it; mark: done once this has run
    std::function<void()> work;
    Clock clock = nullptr;  // adds how long the work took
  };
  struct Queue {
    std::deque<Task> tasks;
    std::thread worker;
    bool running = false;
  };

  bool runs(const Queue& q) const { return async_compute_ || &q < &queues_[kCompute]; }
  void push(Stream, Task);
  bool ready(const Queue& q) const {
    return !q.tasks.empty() && !q.running && (!q.tasks.front().wait || q.tasks.front().wait->done);
  }
  void step(Queue&, std::unique_lock<std::mutex>&);
  void finish(Mark&, std::unique_lock<std::mutex>&);
  void step_any(std::unique_lock<std::mutex>&);
  void wait(std::unique_lock<std::mutex>&);
  void work(Queue&);

  Schedule schedule_;
  std::mt19937_64 random_;
  bool poison_, async_compute_, closing_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  Queue queues_[kQueues];
  Times times_;
};

}  // namespace longgrpo::offload
