// A small world around the offload core: tensors whose content is known, written and read by an asynchronous compute
// stream. Memory that dies is overwritten in the order of its stream, after the streams recorded on it, as a caching
// allocator would reuse it, so that a missing order shows as wrong content.
#pragma once

#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"
#include "host_backend.h"

namespace longgrpo::offload {

// A host backend that can be told to refuse.
class FaultyBackend : public HostBackend {
 public:
  using HostBackend::HostBackend;
  ~FaultyBackend() override { drain(); }

  void copy(Stream stream, void* to, const void* from, size_t bytes) override {
    if (copies_until_failure > 0 && --copies_until_failure == 0) throw std::runtime_error("injected: copy failed");
    HostBackend::copy(stream, to, from, bytes);
  }
  bool pin(void* p, size_t bytes) override {
    if (pinned + bytes > pin_limit) return false;
    pinned += pins[p] = bytes;
    return true;
  }
  void unpin(void* p) override {
    pinned -= pins[p];
    pins.erase(p);
  }
  // As torch's caching allocator has it: memory belongs to the stream that it was allocated on, and waits for the
  // streams of record_stream before it is used again.
  std::shared_ptr<void> device_alloc(size_t bytes) override {
    if (under_pressure) under_pressure();
    if (device + bytes > device_limit) return nullptr;
    device += bytes;
    return {memory(bytes), Block{this, compute(), bytes, true, {}}};
  }
  // For what the engine does not allocate: outside the limit.
  std::shared_ptr<void> tensor(size_t bytes) { return {memory(bytes), Block{this, compute(), bytes, false, {}}}; }
  static void record_stream(const std::shared_ptr<void>& memory, Stream user) {
    std::get_deleter<Block>(memory)->users.push_back(user);
  }
  Stream main() { return HostBackend::compute(); }
  Stream compute() override { return on_side ? side() : main(); }

  std::atomic<bool> on_side{false};
  std::function<void()> under_pressure;  // what an allocator may call before it gives memory
  std::atomic<int> copies_until_failure{0};
  std::map<void*, size_t> pins;
  size_t pin_limit = SIZE_MAX, pinned = 0, device_limit = SIZE_MAX;
  std::atomic<size_t> device{0};

 private:
  struct Block {
    FaultyBackend* backend;
    Stream stream;
    size_t bytes;
    bool limited;
    std::vector<Stream> users;

    void operator()(void* p) const {
      for (Stream user : users) backend->wait(stream, backend->record(user));
      backend->run(stream, [p, bytes = bytes] { std::memset(p, 0xff, bytes); });
      if (limited) backend->device -= bytes;
      std::lock_guard lock(backend->memory_mutex_);
      backend->free_[stream].push_back(static_cast<char*>(p));
    }
  };

  // What the current stream freed last, if anything: of one size, and never malloc's again, for a fault may write it.
  char* memory(size_t bytes) {
    if (bytes > kBlock) throw std::invalid_argument("a tensor of the small world has at most 8 MiB");
    std::lock_guard lock(memory_mutex_);
    auto& mine = free_[compute()];
    if (mine.empty()) {
      memory_.emplace_back(static_cast<char*>(std::malloc(kBlock)), &std::free);
      return memory_.back().get();
    }
    char* p = mine.back();
    mine.pop_back();
    return p;
  }

  static constexpr size_t kBlock = size_t(8) << 20;  // virtual, unless touched
  std::mutex memory_mutex_;
  std::map<Stream, std::vector<char*>> free_;
  std::vector<std::unique_ptr<char, decltype(&std::free)>> memory_;
};

class World {
 public:
  World(Options options, Schedule schedule, uint64_t seed, size_t pin_limit = SIZE_MAX) {
    auto owned = std::make_unique<FaultyBackend>(schedule, seed, /*poison=*/true, /*async_compute=*/true);
    owned->pin_limit = pin_limit;
    backend = owned.get();
    engine = std::make_shared<Engine>(std::move(owned), options);
  }

  // A new tensor of `bytes`, computed, packed and let go. Its content is a function of the number returned.
  int64_t pack(size_t bytes, int64_t group = -1) {
    uint32_t content = ++contents_;
    std::shared_ptr<void> owner = backend->tensor(bytes);
    auto* data = static_cast<char*>(owner.get());
    backend->run(backend->compute(), [=] { fill(data, bytes, content); });
    auto id = engine->pack(data, bytes, std::move(owner), group < 0 ? content : group);
    std::lock_guard lock(mutex_);
    packed_[id] = {bytes, content};
    return id;
  }

  // Compute reads the whole tensor and keeps the loan until give_back.
  void unpack(int64_t id) {
    auto loan = std::make_shared<Loan>(engine->unpack(id));
    std::lock_guard lock(mutex_);
    read(id, *loan, backend->compute());
    loans_.emplace(id, loan);
  }

  // A stream beside compute reads the whole tensor. The loan is over as soon as the read is queued.
  void borrow(int64_t id) {
    Loan loan = engine->unpack(id);
    std::lock_guard lock(mutex_);
    backend->wait(backend->side(), backend->record(backend->compute()));
    read(id, loan, backend->side());
    if (!loan.is_source) FaultyBackend::record_stream(loan.owner, backend->side());
  }

  void give_back(int64_t id) {
    std::shared_ptr<Loan> loan;
    std::lock_guard lock(mutex_);
    if (auto it = loans_.find(id); it != loans_.end()) loan = it->second, loans_.erase(it);
  }

  void drop(int64_t id) {
    engine->drop(id);
    std::lock_guard lock(mutex_);
    packed_.erase(id);
  }

  // Everything is let go; whatever then remains is a leak.
  void finish() {
    loans_.clear();
    while (!packed_.empty()) drop(packed_.begin()->first);
    settle();
  }
  void settle() {
    backend->drain();
    engine->sync();
  }
  size_t size() const { return packed_.size(); }

  std::atomic<int64_t> reads{0}, wrong{0};
  std::shared_ptr<Engine> engine;
  FaultyBackend* backend;

 private:
  static uint32_t word(uint32_t content, size_t i) { return (content * 2654435761u + uint32_t(i)) & 0x7fffffffu; }
  static void fill(char* p, size_t bytes, uint32_t content) {
    for (size_t i = 0; i < bytes; ++i) p[i] = char(word(content, i / 4) >> (8 * (i % 4)));
  }
  static bool holds(const char* p, size_t bytes, uint32_t content) {
    for (size_t i = 0; i < bytes; ++i)
      if (p[i] != char(word(content, i / 4) >> (8 * (i % 4)))) return false;
    return true;
  }

  void read(int64_t id, const Loan& loan, Stream stream) {
    auto [bytes, content] = packed_.at(id);
    auto* data = static_cast<char*>(loan.data);
    backend->run(stream, [=, this, bytes = bytes, content = content, mine = !loan.is_source] {
      ++reads;
      wrong += !holds(data, bytes, content);
      if (mine) std::memset(data, 0xff, bytes);  // the borrower's own memory
    });
    // A source has an owner of its own, who frees it on the stream that packed it.
    if (loan.is_source) backend->wait(backend->main(), backend->record(stream));
  }

  std::mutex mutex_;
  std::atomic<uint32_t> contents_{0};
  std::map<int64_t, std::pair<size_t, uint32_t>> packed_;
  std::multimap<int64_t, std::shared_ptr<Loan>> loans_;
};

}  // namespace longgrpo::offload
