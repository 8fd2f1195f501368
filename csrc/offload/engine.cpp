#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

namespace longgrpo::offload {
namespace {

constexpr size_t kMostBounce = size_t(4) << 20, kLeastBounce = size_t(64) << 10;

std::string count(size_t bytes) { return std::to_string(bytes) + " bytes"; }

}  // namespace

Engine::Engine(std::unique_ptr<Backend> backend, Options options, DeviceAlloc device_alloc)
    : backend_(std::move(backend)),
      options_(options),
      device_alloc_(std::move(device_alloc)),
      arena_(*backend_, options.host_bytes) {
  if (options.prefetch < 0 || options.inflight < 1 || options.keep_last < 0)
    throw std::invalid_argument("offload: prefetch and keep_last must be >= 0 and inflight >= 1");
  if (!device_alloc_) device_alloc_ = [this](size_t bytes) { return backend_->device_alloc(bytes); };
  // Taken before the arena pins all that the driver allows.
  for (bounce_bytes_ = kMostBounce; bounce_bytes_ >= kLeastBounce; bounce_bytes_ /= 2) {
    for (auto& buffer : bounce_) buffer = pinned_buffer(bounce_bytes_);
    if (bounce_[0] && bounce_[1]) return;
    for (auto& buffer : bounce_) buffer = nullptr;
  }
  bounce_bytes_ = 0;
}

Engine::~Engine() {
  backend_->drain();
  for (auto& [id, record] : records_)
    if (record->host) retire(*record);
  reap();
}

// ---- out ----

Engine::Id Engine::pack(const void* data, size_t bytes, std::shared_ptr<void> owner, int64_t group) {
  Releases releases;
  Id id;
  {
    std::lock_guard lock(mutex_);
    auto record = std::make_shared<Record>();
    record->id = id = next_++;
    record->group = group;
    record->bytes = bytes;
    record->data = data;
    record->source = std::move(owner);
    record->stream = backend_->compute();
    record->ready = backend_->record(record->stream);
    records_[id] = record;
    order_[order(*record)] = record.get();
    stats_.device_live += bytes;  // not a peak yet: the caller holds this one anyway
    waiting_.push_back(record);
    try {
      while (waiting_.size() > size_t(options_.keep_last)) {
        auto oldest = std::move(waiting_.front());
        waiting_.pop_front();
        start(*oldest);
        if (oldest->host) inflight_.push_back(std::move(oldest));
      }
    } catch (...) {
      forget(*record, releases);
      throw;
    }
    ++stats_.packs;
    in_group_ = group == group_ ? in_group_ + 1 : 1;
    group_ = group;
    group_size_ = std::max(group_size_, in_group_);
    while (inflight_.size() > size_t(options_.inflight)) {
      release(*inflight_.front(), releases);
      inflight_.pop_front();
    }
    account(0);
  }
  settle(releases);
  return id;
}

void Engine::start(Record& record) {
  if (!record.bytes) return;
  record.host = host_alloc(record.bytes);
  if (!record.host) return;  // kept on the device
  Stream out = backend_->lane(Lane::out);
  try {
    for (auto& r : retired_)
      if (r.host < record.host + record.bytes && record.host < r.host + r.bytes) backend_->wait(out, r.last);
    backend_->poison(out, record.host, record.bytes);
    backend_->wait(out, record.ready);
    copy_pieces(Lane::out, record.host, record.bytes, [&](char* host, size_t offset, size_t n) {
      backend_->copy(out, host, static_cast<const char*>(record.data) + offset, n);
    });
    record.out = backend_->record(out);
  } catch (...) {
    backend_->drain();
    arena_.owns(record.host) ? arena_.free(record.host, record.bytes) : std::free(record.host);
    record.host = nullptr;
    throw;
  }
  stats_.bytes_out += record.bytes;
}

void Engine::release(Record& record, Releases& releases) {
  if (!record.source) return;
  account(-int64_t(record.bytes));
  releases.push_back({record.stream, record.out, std::move(record.source)});
  record.source = nullptr;
}

// The memory is reused in the order of its own stream, so it is enough that this stream waits for the copy.
void Engine::settle(Releases& releases) {
  for (auto& r : releases) backend_->wait(r.stream, r.last, &Times::stall_forward);
  releases.clear();
}

void Engine::drop(Id id) {
  Releases releases;
  {
    std::lock_guard lock(mutex_);
    auto it = records_.find(id);
    if (it == records_.end()) return;
    auto record = it->second;
    forget(*record, releases);
    reap();
  }
  settle(releases);
}

void Engine::forget(Record& record, Releases& releases) {
  unstage(record, releases);
  release(record, releases);
  if (record.host) retire(record);
  auto is_this = [&](const auto& other) { return other.get() == &record; };
  waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), is_this), waiting_.end());
  inflight_.erase(std::remove_if(inflight_.begin(), inflight_.end(), is_this), inflight_.end());
  order_.erase(order(record));
  records_.erase(record.id);
}

// A block is free in the arena at once, so that the same program finds the same blocks at every step whatever the
// timing. Who gets it next lets the out lane wait for its last copy.
void Engine::retire(Record& record) {
  retired_.push_back({record.in ? record.in : record.out, record.host, record.bytes});
  if (arena_.owns(record.host)) arena_.free(record.host, record.bytes);
}

void Engine::reap() {
  for (; !retired_.empty() && backend_->done(retired_.front().last); retired_.pop_front())
    if (!arena_.owns(retired_.front().host)) std::free(retired_.front().host);
}

// ---- in ----

Loan Engine::unpack(Id id) {
  const Stream compute = backend_->compute();
  Releases releases;
  Staged staged;
  Loan loan{};
  Order at;
  size_t bytes;
  {
    std::lock_guard lock(mutex_);
    Record& record = find(id);
    at = order(record), bytes = record.bytes;
    if (record.source) {
      ++stats_.resident;
      loan = {const_cast<void*>(record.data), record.source, true};
      staged.filled = record.ready;
    } else if (record.staged.memory && record.staged.stream == compute) {
      ++stats_.hits;
      staged = lend(record);
    } else {  // nothing is there, or it would be freed in the order of a stream that is not the borrower's
      ++stats_.misses;
      unstage(record, releases);
    }
  }
  settle(releases);
  if (!loan.is_source && !staged.memory) {
    Staged fresh = allocate(bytes, true);
    std::unique_lock lock(mutex_);
    Record& record = find(id);
    unstage(record, releases);  // another thread may have looked ahead to it meanwhile
    load(record, fresh);
    staged = lend(record);
    lock.unlock();
    settle(releases);
  }
  prefetch(at);
  backend_->wait(compute, staged.filled, &Times::stall_backward);
  if (!loan.is_source) loan = {staged.memory.get(), staged.memory, false};
  return loan;
}

Engine::Record& Engine::find(Id id) {
  auto it = records_.find(id);
  if (it == records_.end()) throw std::invalid_argument("offload: record " + std::to_string(id) + " was dropped");
  return *it->second;
}

// Without the lock. If the device is full the engine stops looking ahead; on demand it also gives up what it has
// staged.
Engine::Staged Engine::allocate(size_t bytes, bool demand) {
  std::shared_ptr<void> memory = device_alloc_(bytes);
  if (!memory) {
    Releases releases;
    {
      std::lock_guard lock(mutex_);
      options_.prefetch = 0;
      if (!demand) return {};
      for (auto& [id, record] : records_) unstage(*record, releases);
    }
    settle(releases);
    memory = device_alloc_(bytes);
    if (!memory)
      throw std::runtime_error("offload: out of device memory while bringing back a tensor of " + count(bytes));
  }
  const Stream compute = backend_->compute();
  return {std::move(memory), compute, backend_->record(compute), nullptr};
}

void Engine::load(Record& record, Staged& staged) {
  const Stream in = backend_->lane(Lane::in);
  char* const memory = static_cast<char*>(staged.memory.get());
  try {
    backend_->wait(in, record.out);
    backend_->wait(in, staged.allocated);
    backend_->poison(in, memory, record.bytes);
    copy_pieces(Lane::in, record.host, record.bytes,
                [&](char* host, size_t offset, size_t n) { backend_->copy(in, memory + offset, host, n); });
    staged.filled = record.in = backend_->record(in);
  } catch (...) {
    backend_->drain();  // what was queued before the failure still writes into the memory
    throw;
  }
  stats_.bytes_in += record.bytes;
  account(record.bytes);
  ++staged_, staged_bytes_ += record.bytes;
  if (staged_bytes_ > most_staged_bytes_) most_staged_bytes_ = staged_bytes_, ++stats_.allocations;
  record.staged = std::move(staged);
}

// The engine forgets the memory: whoever has it frees it.
Engine::Staged Engine::lend(Record& record) {
  account(-int64_t(record.bytes));
  --staged_, staged_bytes_ -= record.bytes;
  return std::exchange(record.staged, {});
}

void Engine::unstage(Record& record, Releases& releases) {
  if (!record.staged.memory) return;
  Staged staged = lend(record);
  releases.push_back({staged.stream, staged.filled, std::move(staged.memory)});
}

// The rest of this group and the next `prefetch` groups, unless they are on the device.
std::vector<Engine::Id> Engine::wanted(Order after) const {
  std::vector<Id> ids;
  int groups = 0;
  for (auto it = order_.upper_bound(after); it != order_.end() && options_.prefetch > 0; ++it) {
    const Record& record = *it->second;
    if (!record.host || record.source) continue;
    if (-record.group != after.first && ++groups > options_.prefetch) break;
    after.first = -record.group;
    ids.push_back(record.id);
  }
  return ids;
}

// With what is lent now, prefetch + 1 groups are on the device at most. A backward that takes another order leaves
// staged records behind: they go first.
void Engine::make_room(const std::vector<Id>& wanted, Releases& releases) {
  const size_t most = size_t(options_.prefetch + 1) * group_size_ - 1;
  for (auto it = order_.begin(); it != order_.end() && staged_ >= most; ++it)
    if (std::find(wanted.begin(), wanted.end(), it->second->id) == wanted.end()) unstage(*it->second, releases);
}

// They come in while compute works on what was unpacked last.
void Engine::prefetch(Order after) {
  std::vector<Id> ids;
  {
    std::lock_guard lock(mutex_);
    ids = wanted(after);
  }
  for (Id id : ids) {
    Releases releases;
    size_t bytes = 0;
    {
      std::lock_guard lock(mutex_);
      auto it = records_.find(id);
      if (it == records_.end() || it->second->staged.memory) continue;
      make_room(ids, releases);
      bytes = it->second->bytes;
    }
    settle(releases);
    Staged fresh = allocate(bytes, false);
    if (!fresh.memory) return;
    std::lock_guard lock(mutex_);  // let go before `fresh`, which another thread may have made superfluous
    auto it = records_.find(id);
    if (it != records_.end() && !it->second->staged.memory) load(*it->second, fresh);
  }
}

// ---- host memory ----

char* Engine::host_alloc(size_t bytes) {
  char* host = arena_.find(bytes);
  if (!host) host = arena_.grow(bytes);
  if (host || options_.on_full == OnFull::keep) {
    stats_.keeps += !host;
    return host;
  }
  if (options_.on_full == OnFull::raise)
    throw std::runtime_error("offload: the host arena is full: " + count(bytes) + " asked for, " +
                             count(arena_.live()) + " of " + count(arena_.budget()) +
                             " in use. Raise host_bytes, or set on_full to 'keep' or 'pageable'");
  host = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
  if (!host) throw std::bad_alloc();
  ++stats_.pageable;
  return host;
}

// Pinned pieces go to the copy engine as they are; pageable ones pass through a small pinned buffer, a part at a time,
// in the lane's order: asynchronous, where a direct copy would block the calling thread until the device has caught up.
// A direct copy is all that is left if the driver pins nothing at all: it has read or written the host's side when it
// returns, and then every copy is one.
template <class Copy>
void Engine::copy_pieces(Lane lane, char* host, size_t bytes, Copy&& copy) {
  auto piece = [&](size_t offset, size_t n, bool pinned) {
    if (pinned || bounce_bytes_ == 0) return copy(host + offset, offset, n);
    char* middle = bounce_[int(lane)].get();
    for (size_t end = offset + n; offset < end; offset += bounce_bytes_) {
      size_t part = std::min(bounce_bytes_, end - offset);
      if (lane == Lane::in) backend_->host_copy(backend_->lane(lane), middle, host + offset, part);
      copy(middle, offset, part);
      if (lane == Lane::out) backend_->host_copy(backend_->lane(lane), host + offset, middle, part);
    }
  };
  if (arena_.owns(host))
    arena_.for_each_piece(host, bytes, piece);
  else
    piece(0, bytes, false);
}

// Null if the machine or the driver refuses. Pinned, for a copy from pageable memory may read it at once, and not when
// the stream's own host function has filled it.
std::shared_ptr<char> Engine::pinned_buffer(size_t bytes) {
  std::unique_ptr<char, decltype(&std::free)> memory(static_cast<char*>(std::aligned_alloc(4096, bytes)), &std::free);
  if (!memory || !backend_->pin(memory.get(), bytes)) return nullptr;
  return {memory.release(), [this](char* p) {
            backend_->unpin(p);
            std::free(p);
          }};
}

// ---- accounts ----

void Engine::account(int64_t device_bytes) {
  stats_.device_live += device_bytes;
  stats_.device_peak = std::max(stats_.device_peak, stats_.device_live);
}

void Engine::sync() {
  backend_->drain();
  std::lock_guard lock(mutex_);
  reap();
}

Stats Engine::stats() {
  std::lock_guard lock(mutex_);
  reap();
  Stats s = stats_;
  Times times = backend_->times();
  s.records = records_.size();
  s.allocations += arena_.growths();
  s.host_live = arena_.live(), s.host_peak = arena_.peak(), s.host_committed = arena_.committed();
  s.host_pinned = arena_.pinned(), s.host_budget = arena_.budget();
  s.prefetch = options_.prefetch;
  s.copy_out_ns = times.copy_out, s.copy_in_ns = times.copy_in;
  s.stall_forward_ns = times.stall_forward, s.stall_backward_ns = times.stall_backward;
  return s;
}

}  // namespace longgrpo::offload
