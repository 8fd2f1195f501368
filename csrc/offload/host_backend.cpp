#include "host_backend.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace longgrpo::offload {
namespace {

int64_t now() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }

}  // namespace

HostBackend::HostBackend(Schedule schedule, uint64_t seed, bool poison, bool async_compute)
    : schedule_(schedule), random_(seed), poison_(poison), async_compute_(async_compute) {
  if (schedule == Schedule::threaded)
    for (Queue& q : queues_)
      if (runs(q)) q.worker = std::thread([this, &q] { work(q); });
}

HostBackend::~HostBackend() {
  drain();
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  for (Queue& q : queues_)
    if (q.worker.joinable()) q.worker.join();
}

void HostBackend::push(Stream stream, Task task) {
  std::unique_lock lock(mutex_);
  static_cast<Queue*>(stream)->tasks.push_back(std::move(task));
  if (schedule_ == Schedule::threaded) changed_.notify_all();
  if (schedule_ == Schedule::seeded)
    for (auto n = random_() % 3; n > 0; --n) step_any(lock);
}

// Runs the first task of the queue without the lock: tasks only touch the memory they were given.
void HostBackend::step(Queue& q, std::unique_lock<std::mutex>& lock) {
  Task task = std::move(q.tasks.front());
  q.tasks.pop_front();
  q.running = true;
  lock.unlock();
  int64_t start = now();
  if (task.work) task.work();
  int64_t took = now() - start;
  task.work = nullptr;  // what it owns dies before anyone sees it done
  lock.lock();
  q.running = false;
  if (task.clock) times_.*task.clock += took;
  if (task.mark) task.mark->done = true;
  changed_.notify_all();
}

void HostBackend::step_any(std::unique_lock<std::mutex>& lock) {
  std::vector<Queue*> candidates;
  for (Queue& q : queues_)
    if (ready(q)) candidates.push_back(&q);
  if (!candidates.empty()) step(*candidates[random_() % candidates.size()], lock);
}

// condition_variable::wait of GCC 12 is a symbol of its own libstdc++ (GLIBCXX_3.4.30), which RHEL 9 does not have;
// wait_for is inline.
void HostBackend::wait(std::unique_lock<std::mutex>& lock) { changed_.wait_for(lock, std::chrono::hours(1)); }

void HostBackend::work(Queue& q) {
  std::unique_lock lock(mutex_);
  for (;;) {
    while (!ready(q) && !(closing_ && q.tasks.empty())) wait(lock);
    if (q.tasks.empty()) return;
    step(q, lock);
  }
}

// Makes the mark done, running as little as the order allows (lazy), anything (seeded) or nothing but waiting
// (threaded).
void HostBackend::finish(Mark& mark, std::unique_lock<std::mutex>& lock) {
  while (!mark.done) {
    Queue& q = *mark.queue;
    if (schedule_ == Schedule::threaded || q.running) {
      wait(lock);
    } else if (schedule_ == Schedule::seeded) {
      step_any(lock);
    } else if (ready(q)) {
      step(q, lock);
    } else {
      auto before = q.tasks.front().wait;
      finish(*before, lock);
    }
  }
}

Event HostBackend::record(Stream stream) {
  if (!stream) return nullptr;
  auto mark = std::make_shared<Mark>(Mark{static_cast<Queue*>(stream)});
  push(stream, {nullptr, mark, nullptr});
  return mark;
}

void HostBackend::wait(Stream stream, const Event& event, Clock stall) {
  if (!event) return;
  auto mark = std::static_pointer_cast<Mark>(event);
  if (stream) return push(stream, {mark, nullptr, nullptr});
  int64_t start = now();
  std::unique_lock lock(mutex_);
  if (mark->done) return;
  finish(*mark, lock);
  if (stall) times_.*stall += now() - start;
}

bool HostBackend::done(const Event& event) {
  std::lock_guard lock(mutex_);
  return !event || static_cast<Mark*>(event.get())->done;
}

void HostBackend::block(const Event& event) {
  if (!event) return;
  std::unique_lock lock(mutex_);
  finish(*static_cast<Mark*>(event.get()), lock);
}

void HostBackend::drain() noexcept {
  for (Queue& q : queues_)
    if (runs(q)) block(record(&q));
}

void HostBackend::copy(Stream stream, void* to, const void* from, size_t bytes) {
  push(stream, {nullptr, nullptr, [=] { std::memcpy(to, from, bytes); },
                stream == &queues_[kOut] ? &Times::copy_out : &Times::copy_in});
}

void HostBackend::poison(Stream stream, void* p, size_t bytes) {
  if (poison_) run(stream, [=] { std::memset(p, 0xff, bytes); });  // a NaN in every floating type
}

void HostBackend::run(Stream stream, std::function<void()> work) { push(stream, {nullptr, nullptr, std::move(work)}); }

std::shared_ptr<void> HostBackend::device_alloc(size_t bytes) {
  auto free_in_order = [this](void* p) { compute() ? run(compute(), [p] { std::free(p); }) : std::free(p); };
  return {std::aligned_alloc(64, (bytes + 63) / 64 * 64), free_in_order};
}

Times HostBackend::times() {
  std::lock_guard lock(mutex_);
  return times_;
}

}  // namespace longgrpo::offload
