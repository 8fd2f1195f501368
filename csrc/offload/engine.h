// Moves tensors that wait for the backward into host memory and back, off the compute stream's critical path.
//
//   pack    The newest keep_last records stay on the device; older ones are copied out on the out lane. At most
//           `inflight` sources live on behind their copy: past that the compute stream waits for the oldest copy, and
//           its source is let go.
//   unpack  A source that is still there is lent as it is. Otherwise the record comes back through a ring of device
//           slots for prefetch + 1 groups, filled on the in lane ahead of the compute stream: newest group first, and
//           in a group in the order of packing, which is how a backward asks for the inputs of its checkpoints.
//   drop    The host block returns to the arena; the out lane waits for its last copy before it is written again.
//
// The orders that make it correct, each an event between two streams:
//   compute -> out      the source is written before it is copied                 (Record::ready)
//   out     -> compute  the copy has run before the source's memory is reused     (Record::out)
//   out     -> in       a record comes back after its own copy out                (Record::out)
//   in      -> compute  the slot is filled before compute reads it                (Slot::filled)
//   compute -> in       compute has read the slot before it is filled again       (Slot::read)
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
          misses = 0;               // unpacks: source still there, slot already filled or filling, loaded on demand
  int64_t keeps = 0, pageable = 0;  // records the arena had no room for
  int64_t records = 0, allocations = 0;  // records alive; growths of the arena + device allocations
  int64_t host_live = 0, host_peak = 0, host_committed = 0, host_pinned = 0, host_budget = 0;
  int64_t device_live = 0, device_peak = 0;  // sources held back + ring
  int64_t prefetch = 0;                      // now: lowered when the device runs out of memory
  int64_t copy_out_ns = 0, copy_in_ns = 0, stall_forward_ns = 0, stall_backward_ns = 0;
};

// What unpack lends: `owner` is the source's own owner, or gives the slot back when it dies, on whichever thread that
// is.
struct Loan {
  void* data;
  std::shared_ptr<void> owner;
  bool is_source;
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  using Id = int64_t;
  using DeviceAlloc = std::function<std::shared_ptr<void>(size_t)>;  // null: out of memory

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
  struct Slot;
  struct Record {
    Id id;
    int64_t group;
    size_t bytes;
    const void* data;
    std::shared_ptr<void> source;  // null once released
    Stream stream;                 // compute at pack: where the source's memory will be reused
    Event ready, out, in;          // written; copied out; last copied in
    char* host = nullptr;
    Slot* slot = nullptr;  // prefetched
  };
  struct Slot {
    std::shared_ptr<void> memory;
    size_t bytes = 0;
    Event read, filled;
    Record* record = nullptr;  // staged for
    bool lent = false, extra = false;
    Stream stream = nullptr;  // of the borrower
  };
  struct Retired {
    Event last;
    char* host;
    size_t bytes;
  };
  struct Release {
    Stream stream;
    Event out;
    std::shared_ptr<void> source;
  };
  // Sources are let go after the lock is: an owner may be a lent slot of this engine, or need Python's lock.
  using Releases = std::vector<Release>;

  void start(Record&);
  void release(Record&, Releases&);
  void settle(Releases&);
  void forget(Record&, Releases&);

  Slot* load(Record&, Slot*);
  Slot* take_slot(size_t bytes, const std::vector<Record*>& wanted, bool demand);
  bool fit(Slot&, size_t bytes);
  using Order = std::pair<int64_t, Id>;  // what a backward asks for, first to last
  static Order order(const Record& record) { return {-record.group, record.id}; }
  void prefetch(Order after);
  void give_back(Slot*) noexcept;

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
  Order cursor_;                          // the record unpacked last
  int64_t group_ = -1;                    // the group packed last
  size_t in_group_ = 0, group_size_ = 1;  // records of that group, and of the largest one
  std::unordered_map<Id, std::shared_ptr<Record>> records_;
  std::map<Order, Record*> order_;
  std::deque<std::shared_ptr<Record>> waiting_, inflight_;
  std::deque<Retired> retired_;
  std::vector<std::unique_ptr<Slot>> ring_;
  std::shared_ptr<char> bounce_[2];
  size_t bounce_bytes_;  // 0: the driver pins nothing
};

}  // namespace longgrpo::offload
