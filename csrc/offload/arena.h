// Host memory in exact sizes. One range of addresses is reserved up to the budget and committed (touched, pinned) as
// far as it has ever been needed; a first-fit free list with coalescing lies on top. Not thread safe: the engine holds
// its lock.
//
// torch's pinned allocator rounds every block up to a power of two; here committed <= the peak of live bytes + one page
// a growth.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "backend.h"

namespace longgrpo::offload {

class Arena {
 public:
  Arena(Backend&, size_t budget);
  ~Arena();
  Arena(const Arena&) = delete;

  char* find(size_t bytes);  // from what is committed; null: nothing fits
  char* grow(size_t bytes);  // commits what is missing; null: the budget or the machine is exhausted
  void free(char*, size_t bytes);

  // Copies may not cross a border between two registrations, nor use the DMA engine where pinning was refused.
  using Piece = std::function<void(size_t offset, size_t bytes, bool pinned)>;
  void for_each_piece(const char*, size_t bytes, const Piece&) const;

  bool owns(const char* p) const { return p >= base_ && p < base_ + reserved_; }
  size_t budget() const { return budget_; }
  size_t live() const { return live_; }
  size_t peak() const { return peak_; }
  size_t committed() const { return committed_; }
  size_t pinned() const { return pinned_; }
  int64_t growths() const { return growths_; }

 private:
  char* take(std::map<size_t, size_t>::iterator block, size_t bytes);
  void pin(size_t offset, size_t bytes);

  struct Registration {
    size_t bytes;
    bool pinned;
  };
  Backend& backend_;
  size_t budget_, reserved_, committed_ = 0, live_ = 0, peak_ = 0, pinned_ = 0;
  int64_t growths_ = 0;
  bool pin_refused_ = false;
  char* base_ = nullptr;
  std::map<size_t, size_t> free_;                 // offset -> bytes
  std::map<size_t, Registration> registrations_;  // offset -> registration
};

// min(cgroup limit - use, MemAvailable - reserve) / ranks on this node (LOCAL_WORLD_SIZE). `root` prefixes /proc and
// /sys.
size_t host_budget(const std::string& root = "");

}  // namespace longgrpo::offload
