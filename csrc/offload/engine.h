// Moves tensors that wait for the backward into host memory and back, off the compute stream's critical path.
//
//   pack    The newest keep_last records stay on the device; older ones are copied out on the out lane. At most
//           `inflight` sources live on behind their copy: past that the compute stream waits for the oldest copy, and
//           its source is let go.
//   unpack  A source that is still there is lent as it is. Otherwise the record comes back in memory of its own, which
//           is filled on the in lane ahead of the compute stream: newest group first, and in a group in the order of
//           packing, which is how a backward asks for the inputs of its checkpoints. The borrower owns that memory, and
//           the allocator takes it back after every stream that the borrower has recorded on it (record_stream).
//   drop    The host block returns to the arena; the out lane waits for its last copy before it is written again.
//
// The orders that make it correct, each an event between two streams:
//   compute -> out      the source is written before it is copied                 (Record::ready)
//   out     -> compute  the copy has run before the source's memory is reused     (Record::out)
//   out     -> in       a record comes back after its own copy out                (Record::out)
//   in      -> compute  memory is filled before compute reads it, or frees it      (Staged::filled)
//   compute -> in       earlier users of the memory are done before it is filled   (Staged::allocated)
//   in      -> out      a host block's copies have run before it is written again (Retired::last)
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "arena.h"
#include "backend.h"

namespace longgrpo::offload {

enum class OnFull { keep, pageable, raise };

struct Options {
  size_t host_bytes;
  int prefetch = 1, inflight = 2, keep_last = 1;
  OnFull on_full = OnFull::keep;
};

// Bytes, counts and nanoseconds; the order is that of longgrpo._ops.offload.STATS.
struct Stats {
  int64_t packs = 0, bytes_out = 0, bytes_in = 0;
  int64_t resident = 0, hits = 0,
          misses = 0;                    // unpacks: source still there, staged, loaded on demand
  int64_t keeps = 0, pageable = 0;       // records the arena had no room for
  int64_t records = 0, allocations = 0;  // records alive; growths of the arena and of the most staged
  int64_t host_live = 0, host_peak = 0, host_committed = 0, host_pinned = 0, host_budget = 0;
  int64_t device_live = 0, device_peak = 0;  // sources held back + staged
  int64_t prefetch = 0;                      // now: lowered when the device runs out of memory
  int64_t copy_out_ns = 0, copy_in_ns = 0, stall_forward_ns = 0, stall_backward_ns = 0;
};

// What unpack lends: `owner` is the source's own owner, or the memory that DeviceAlloc returned.
struct Loan {
  void* data;
  std::shared_ptr<void> owner;
  bool is_source;
};

class Engine {
 public:
  using Id = int64_t;
  // Memory in the order of the current compute stream, and freed in that order; null: out of memory. Called without the
  // engine's lock: an allocator under pressure may let go of tensors, and of records with them.
  using DeviceAlloc = std::function<std::shared_ptr<void>(size_t)>;

  Engine(std::unique_ptr<Backend>, Options, DeviceAlloc = {});
  ~Engine();

  // `group` is shared by the records of one checkpoint and grows from one checkpoint to the next.
  Id pack(const void* data, size_t bytes, std::shared_ptr<void> owner, int64_t group);
  Loan unpack(Id);  // any order, any number of times, until drop
  void drop(Id);
  void sync();  // waits until no copy is in flight and every block of a dropped record is free
  Stats stats();
  Backend& backend() { return *backend_; }

 private:
  struct Staged {  // a record's bytes on the device, filled or on their way
    std::shared_ptr<void> memory;
    Stream stream = nullptr;  // the compute stream in whose order the memory was allocated
    Event allocated, filled;
  };
  struct Record {
    Id id;
    int64_t group;
    size_t bytes;
    const void* data;
    std::shared_ptr<void> source;  // null once released
    Stream stream;                 // compute at pack: where the source's memory will be reused
    Event ready, out, in;          // written; copied out; last copied in
    char* host = nullptr;
    Staged staged;
  };
  struct Retired {
    Event last;
    char* host;
    size_t bytes;
  };
  struct Release {
    Stream stream;
    Event last;  // the copy that reads or writes the memory
    std::shared_ptr<void> memory;
  };
  // Memory is let go after the lock is: its owner may need Python's lock.
  using Releases = std::vector<Release>;

  void start(Record&);
  void release(Record&, Releases&);
  void settle(Releases&);
  void forget(Record&, Releases&);

  Record& find(Id);
  Staged allocate(size_t bytes, bool demand);
  void load(Record&, Staged& into);
  Staged lend(Record&);
  void unstage(Record&, Releases&);
  using Order = std::pair<int64_t, Id>;  // what a backward asks for, first to last
  static Order order(const Record& record) { return {-record.group, record.id}; }
  std::vector<Id> wanted(Order after) const;
  void make_room(const std::vector<Id>& wanted, Releases&);
  void prefetch(Order after);

  char* host_alloc(size_t bytes);
  void retire(Record&);
  void reap();
  template <class Copy>
  void copy_pieces(Lane, char* host, size_t bytes, Copy&&);
  std::shared_ptr<char> pinned_buffer(size_t bytes);
  void account(int64_t device_bytes);

  std::unique_ptr<Backend> backend_;
  Options options_;
  DeviceAlloc device_alloc_;
  std::mutex mutex_;
  Arena arena_;
  Stats stats_;
  Id next_ = 0;
  int64_t group_ = -1;                    // the group packed last
  size_t in_group_ = 0, group_size_ = 1;  // records of that group, and of the largest one
  std::unordered_map<Id, std::shared_ptr<Record>> records_;
  std::map<Order, Record*> order_;
  std::deque<std::shared_ptr<Record>> waiting_, inflight_;
  std::deque<Retired> retired_;
  size_t staged_ = 0, staged_bytes_ = 0, most_staged_bytes_ = 0;
  std::shared_ptr<char> bounce_[2];
  size_t bounce_bytes_;  // 0: the driver pins nothing
};

}  // namespace longgrpo::offload
