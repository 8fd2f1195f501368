// Nothing is allocated and nothing moves: the engine's own accounts are the result. For the memory planner's dry run.
#pragma once

#include "backend.h"

namespace longgrpo::offload {

class CountingBackend : public Backend {
 public:
  Stream compute() override { return nullptr; }
  Stream lane(Lane) override { return nullptr; }
  Event record(Stream) override { return nullptr; }
  void wait(Stream, const Event&, Clock) override {}
  bool done(const Event&) override { return true; }
  void block(const Event&) override {}
  void drain() noexcept override {}
  void copy(Stream, void*, const void*, size_t) override {}
  void host_copy(Stream, void*, const void*, size_t) override {}
  std::shared_ptr<void> device_alloc(size_t) override {
    return {this, [](void*) {}};
  }
  bool pin(void*, size_t) override { return true; }
  void unpin(void*) override {}
  bool touches_memory() const override { return false; }
};

}  // namespace longgrpo::offload
