#include "arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <vector>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace longgrpo::offload {
namespace {

constexpr size_t kAlign = 512, kPage = 4096;
constexpr size_t kTouchPart = size_t(32) << 20;  // less than this a thread is not worth its start
constexpr size_t kSmallestPin = size_t(1) << 20;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

bool touch(char* p, size_t bytes) {
  if (madvise(p, bytes, MADV_POPULATE_WRITE) == 0) return true;
  if (errno != EINVAL) return false;  // ENOMEM: this would otherwise be the OOM killer, later
  for (size_t i = 0; i < bytes; i += kPage) reinterpret_cast<volatile char*>(p)[i] = 0;  // Linux < 5.14
  return true;
}

// Page faults are most of the cost of new host memory, and they scale with threads.
bool touch_parallel(char* p, size_t bytes) {
  size_t threads = std::clamp<size_t>(bytes / kTouchPart, 1, std::clamp(std::thread::hardware_concurrency(), 1u, 8u));
  size_t part = round_up(bytes / threads, kPage);
  std::vector<char> ok(threads, 1);
  std::vector<std::thread> workers;
  for (size_t i = 1; i < threads; ++i)
    if (i * part < bytes)
      workers.emplace_back([&, i] { ok[i] = touch(p + i * part, std::min(part, bytes - i * part)); });
  ok[0] = touch(p, std::min(part, bytes));
  for (auto& worker : workers) worker.join();
  return std::all_of(ok.begin(), ok.end(), [](char c) { return c; });
}

}  // namespace

Arena::Arena(Backend& backend, size_t budget)
    : backend_(backend), budget_(budget), reserved_(round_up(std::max(budget, kPage), kPage)) {
  void* p = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    throw std::runtime_error("offload: cannot reserve " + std::to_string(reserved_) +
                             " bytes of address space (ulimit -v?)");
  base_ = static_cast<char*>(p);
  madvise(base_, reserved_, MADV_HUGEPAGE);  // refused where huge pages are off: no loss
}

Arena::~Arena() {
  for (auto& [offset, registration] : registrations_)
    if (registration.pinned) backend_.unpin(base_ + offset);
  munmap(base_, reserved_);
}

char* Arena::take(std::map<size_t, size_t>::iterator block, size_t bytes) {
  auto [offset, size] = *block;
  free_.erase(block);
  if (size > bytes) free_[offset + bytes] = size - bytes;
  live_ += bytes;
  peak_ = std::max(peak_, live_);
  return base_ + offset;
}

char* Arena::find(size_t bytes) {
  bytes = round_up(bytes, kAlign);
  for (auto block = free_.begin(); block != free_.end(); ++block)
    if (block->second >= bytes) return take(block, bytes);
  return nullptr;
}

char* Arena::grow(size_t bytes) {
  bytes = round_up(bytes, kAlign);
  size_t start = committed_;  // a free block at the end is part of what is asked for
  if (!free_.empty() && free_.rbegin()->first + free_.rbegin()->second == committed_) start = free_.rbegin()->first;
  size_t end = round_up(start + bytes, kPage);
  if (start + bytes > budget_ || end > reserved_) return nullptr;
  if (size_t more = end - committed_; backend_.touches_memory()) {
    if (mprotect(base_ + committed_, more, PROT_READ | PROT_WRITE) != 0) return nullptr;
    if (!touch_parallel(base_ + committed_, more)) {
      madvise(base_ + committed_, more, MADV_DONTNEED);
      return nullptr;
    }
    pin(committed_, more);
  }
  free_[start] = end - start;
  committed_ = end;
  ++growths_;
  return take(std::prev(free_.end()), bytes);
}

// A refusal (RLIMIT_MEMLOCK, WSL2's cap) comes at a total nobody can ask for: halve until it fits, then stay pageable.
void Arena::pin(size_t offset, size_t bytes) {
  if (!pin_refused_ && backend_.pin(base_ + offset, bytes)) {
    registrations_[offset] = {bytes, true};
    pinned_ += bytes;
  } else if (!pin_refused_ && bytes >= 2 * kSmallestPin) {
    size_t half = round_up(bytes / 2, kPage);
    pin(offset, half);
    pin(offset + half, bytes - half);
  } else {
    registrations_[offset] = {bytes, false};
    pin_refused_ = true;
  }
}

void Arena::free(char* p, size_t bytes) {
  bytes = round_up(bytes, kAlign);
  live_ -= bytes;
  auto block = free_.emplace(p - base_, bytes).first;
  if (auto next = std::next(block); next != free_.end() && block->first + block->second == next->first) {
    block->second += next->second;
    free_.erase(next);
  }
  if (block == free_.begin()) return;
  if (auto before = std::prev(block); before->first + before->second == block->first) {
    before->second += block->second;
    free_.erase(block);
  }
}

void Arena::for_each_piece(const char* p, size_t bytes, const Piece& piece) const {
  size_t begin = p - base_, done = 0;
  if (registrations_.empty()) return piece(0, bytes, true);  // a dry run
  for (auto it = std::prev(registrations_.upper_bound(begin)); done < bytes; ++it) {
    size_t n = std::min(bytes - done, it->first + it->second.bytes - (begin + done));
    piece(done, n, it->second.pinned);
    done += n;
  }
}

namespace {

std::string read(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

// A limit may sit on any ancestor of our group; an unlimited one reads "max" (v2) or about 2^63 (v1).
size_t cgroup_left(const std::string& mount, std::string group, const char* limit_file, const char* use_file) {
  size_t left = SIZE_MAX;
  for (;;) {
    std::string limit = read(mount + group + "/" + limit_file), use = read(mount + group + "/" + use_file);
    if (!limit.empty() && limit[0] != 'm' && !use.empty()) {
      size_t l = std::stoull(limit), u = std::stoull(use);
      left = std::min(left, l > u ? l - u : 0);
    }
    if (group.empty() || group == "/") return left;
    group.resize(group.rfind('/'));
  }
}

}  // namespace

size_t host_budget(const std::string& root) {
  std::istringstream meminfo(read(root + "/proc/meminfo")), groups(read(root + "/proc/self/cgroup"));
  size_t total = 0, available = 0, left = SIZE_MAX;
  for (std::string key, line; meminfo >> key && std::getline(meminfo, line);) {
    if (key == "MemTotal:") total = std::stoull(line) << 10;
    if (key == "MemAvailable:") available = std::stoull(line) << 10;
  }
  for (std::string line; std::getline(groups, line);) {  // "hierarchy:controllers:path"
    size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (controllers.empty())
      left = std::min(left, cgroup_left(root + "/sys/fs/cgroup", path, "memory.max", "memory.current"));
    if (("," + controllers + ",").find(",memory,") != std::string::npos)
      left = std::min(
          left, cgroup_left(root + "/sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes"));
  }
  size_t reserve = std::min(total / 20, size_t(4) << 30);  // for the loader, the page cache, everyone else
  size_t budget = std::min(left, available > reserve ? available - reserve : 0);
  const char* ranks = std::getenv("LOCAL_WORLD_SIZE");
  return budget / std::max(1, ranks ? std::atoi(ranks) : 1);
}

}  // namespace longgrpo::offload
