// Times the offload core on its host backend, without torch: the arena, the copies each way, and how much of them a
// compute load hides. `bench_offload [--mib N] [--layers N] [--json FILE] [--quick]`.
#include <cstdlib>
#include <cstring>
#include <random>

#include "bench.h"
#include "engine.h"
#include "host_backend.h"

using namespace longgrpo::offload;

namespace {

struct Settings {
  size_t bytes = size_t(16) << 20;
  int layers = 16;
  std::string json;
  bool quick = false;
};

Settings parse(int argc, char** argv) {
  Settings options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&] { return i + 1 < argc ? argv[++i] : ""; };
    if (name == "--quick")
      options.quick = true, options.bytes = size_t(1) << 20, options.layers = 4;
    else if (name == "--mib")
      options.bytes = size_t(std::atoll(value())) << 20;
    else if (name == "--layers")
      options.layers = std::atoi(value());
    else if (name == "--json")
      options.json = value();
    else
      options.bytes = 0;
  }
  if (options.bytes < 1 || options.layers < 1) {
    std::fprintf(stderr, "bench_offload [--mib N] [--layers N] [--json FILE] [--quick]\n");
    std::exit(2);
  }
  return options;
}

// A layer's computation: multiply-adds in registers, so that it competes with the copies for nothing but a core.
double compute(double seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  double a[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  while (std::chrono::steady_clock::now() < end)
    for (int i = 0; i < 20000; ++i)
      for (double& x : a) x = x * 0.999999 + 1e-9;
  return a[0];
}

using Buffer = std::shared_ptr<void>;

Buffer buffer(size_t bytes) {
  Buffer p(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), std::free);
  std::memset(p.get(), 1, bytes);
  return p;
}

std::shared_ptr<Engine> engine(size_t host_bytes) {
  return std::make_shared<Engine>(std::make_unique<HostBackend>(), Options{host_bytes});
}

// Forward and backward of equal layers; with an engine their inputs are offloaded.
void step(Engine* engine, const std::vector<Buffer>& inputs, size_t bytes, double seconds) {
  std::vector<Engine::Id> ids;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (engine) ids.push_back(engine->pack(inputs[i].get(), bytes, inputs[i], int64_t(i)));
    compute(seconds);
  }
  for (size_t i = inputs.size(); i-- > 0;) {
    Loan loan;
    if (engine) loan = engine->unpack(ids[i]);
    compute(3 * seconds);  // recompute and backward
    if (engine) engine->drop(ids[i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Settings options = parse(argc, argv);
  const size_t bytes = options.bytes, host = 2 * bytes * options.layers + (size_t(64) << 20);
  const double both = 2.0 * double(bytes);  // a copy reads and writes
  std::vector<Buffer> inputs;
  for (int i = 0; i < options.layers; ++i) inputs.push_back(buffer(bytes));
  auto target = buffer(bytes);

  bench::CacheFlush flush;
  const bench::Effort effort{options.quick ? 3 : 15, 0.0};
  const auto time = [&](const bench::Case& c) { return bench::measure(c, effort, flush); };
  const bench::Case copy{
      "memcpy", 0, both, [&](int i) { std::memcpy(target.get(), inputs[i % options.layers].get(), bytes); }, {}};
  const bench::Ceilings top{1, copy.bytes / time(copy).fastest};

  bench::Report report(options.json);
  report.header();
  const std::string about = "\"device\": \"cpu\", \"backend\": \"host\", \"bytes\": " + std::to_string(bytes);
  const auto add = [&](const bench::Case& c) {
    const bench::Timing timing = time(c);
    report.add(c, timing, top, about);
    return timing.median;
  };
  add(copy);

  {  // mmap, touch and pin new memory; then hand out what is there
    HostBackend backend;
    std::unique_ptr<Arena> arena;
    add({"arena grow", 0, double(bytes), [&](int) { arena->grow(bytes); },
         [&](int) { arena = std::make_unique<Arena>(backend, host); }});
    std::vector<char*> blocks(1000);
    add({"arena 1000 x find + free",
         0,
         0,
         [&](int) {
           for (auto& block : blocks) block = arena->find(512);
           for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) arena->free(*it, 512);
         },
         {}});
  }
  {
    auto one = engine(host);
    std::vector<Engine::Id> ids;
    const auto drop = [&](int) {
      for (auto id : ids) one->drop(id);
      ids.clear();
      one->sync();
    };
    add({"out", 0, both * (options.layers - 1),
         [&](int) {
           for (auto& input : inputs) ids.push_back(one->pack(input.get(), bytes, input, int64_t(ids.size())));
           one->backend().drain();
         },
         drop});
    add({"in", 0, both * (options.layers - 3),
         [&](int) {
           for (auto id = ids.rbegin(); id != ids.rend(); ++id) one->unpack(*id);
         },
         [&](int i) {
           drop(i);
           for (auto& input : inputs) ids.push_back(one->pack(input.get(), bytes, input, int64_t(ids.size())));
           one->backend().drain();
         }});
    drop(0);
  }
  {  // A layer computes for twice as long as its copies take one way; a step may then cost what it costs without
     // offload.
    const double seconds = 2 * double(bytes) * 2 / top.bytes;
    auto one = engine(host);
    const double without = add({"step", 0, 0, [&](int) { step(nullptr, inputs, bytes, seconds); }, {}});
    const double with = add({"step, offloaded", 0, 0, [&](int) { step(one.get(), inputs, bytes, seconds); }, {}});
    const Stats s = one->stats();
    const double copies = 1e-9 * double(s.copy_out_ns + s.copy_in_ns) * options.layers / double(s.packs);
    std::printf("overlap: a step has %.2f ms of copies and takes %+.2f ms: %.1f%% hidden; hits %lld, misses %lld\n",
                1e3 * copies, 1e3 * (with - without), 100 * (1 - std::max(0.0, with - without) / copies),
                static_cast<long long>(s.hits), static_cast<long long>(s.misses));
  }
}
