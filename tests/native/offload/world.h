// A small world around the offload core: tensors whose content is known, written and read by an asynchronous compute
// stream. Memory that dies is overwritten in compute's order, as a caching allocator would reuse it, so that a missing
// order shows as wrong content.
#pragma once

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "engine.h"
#include "host_backend.h"

namespace longgrpo::offload {

// A host backend that can be told to refuse.
class FaultyBackend : public HostBackend {
 public:
  using HostBackend::HostBackend;

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
  std::shared_ptr<void> device_alloc(size_t bytes) override {
    if (device + bytes > device_limit) return nullptr;
    device += bytes;
    auto memory = HostBackend::device_alloc(bytes);
    return {memory.get(), [this, memory, bytes](void*) { device -= bytes; }};
  }

  std::atomic<int> copies_until_failure{0};
  std::map<void*, size_t> pins;
  size_t pin_limit = SIZE_MAX, pinned = 0, device_limit = SIZE_MAX;
  std::atomic<size_t> device{0};
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
    auto* data = static_cast<char*>(std::malloc(bytes + 1));
    std::memset(data, 0xff, bytes);
    backend->run(backend->compute(), [=] { fill(data, bytes, content); });
    auto* stream = backend;
    std::shared_ptr<void> owner(data, [=](char* p) {
      stream->run(stream->compute(), [=] {
        std::memset(p, 0xff, bytes);
        std::free(p);
      });
    });
    auto id = engine->pack(data, bytes, owner, group < 0 ? content : group);
    std::lock_guard lock(mutex_);
    packed_[id] = {bytes, content};
    return id;
  }

  // Compute reads the whole tensor and keeps the loan until give_back.
  void unpack(int64_t id) {
    auto loan = std::make_shared<Loan>(engine->unpack(id));
    std::lock_guard lock(mutex_);
    auto [bytes, content] = packed_.at(id);
    auto* data = static_cast<char*>(loan->data);
    backend->run(backend->compute(), [this, data, bytes = bytes, content = content] {
      ++reads;
      wrong += !holds(data, bytes, content);
    });
    loans_.emplace(id, loan);
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

  std::mutex mutex_;
  std::atomic<uint32_t> contents_{0};
  std::map<int64_t, std::pair<size_t, uint32_t>> packed_;
  std::multimap<int64_t, std::shared_ptr<Loan>> loans_;
};

}  // namespace longgrpo::offload
