// Random and fixed programs against the offload core under every schedule; no Python. `stress [programs]` says what
// broke and exits 1. tests/offload/test_native.py builds it with each planted fault, and under
// ThreadSanitizer and AddressSanitizer.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "world.h"

using namespace longgrpo::offload;

namespace {

std::string context;

void require(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAILED: %s (%s)\n", what, context.c_str());
  std::exit(1);
}

void require_clean(World& world) {
  world.finish();
  Stats s = world.engine->stats();
  require(world.wrong == 0, "compute read wrong content");
  require(s.records == 0, "a record leaked");
  require(s.host_live == 0, "host memory leaked");
}

// Steps of `layers` equal layers, backward in reverse order: the case the engine is made for.
void in_order(Schedule schedule, uint64_t seed) {
  const size_t bytes = 3000, layers = 9;
  Options options{size_t(1) << 20};
  World world(options, schedule, seed);
  int64_t allocations = 0;
  for (int step = 0; step < 4; ++step) {
    std::vector<int64_t> ids;
    for (size_t i = 0; i < layers; ++i) ids.push_back(world.pack(bytes));
    for (; !ids.empty(); ids.pop_back()) {
      world.unpack(ids.back());
      world.drop(ids.back());
      world.give_back(ids.back());
    }
    Stats s = world.engine->stats();
    if (step == 1) allocations = s.allocations;
    require(step < 2 || s.allocations == allocations, "an allocation after the second step");
    require(s.misses == 0, "a record was not prefetched");
    require(s.device_peak <= int64_t((options.inflight + options.keep_last + options.prefetch + 1) * bytes),
            "too much device memory");
    require(s.host_committed <= int64_t(layers * 3072 + 4096 * layers), "too much host memory");
  }
  require_clean(world);
}

void retain_graph(Schedule schedule, uint64_t seed) {
  World world({size_t(1) << 20}, schedule, seed);
  std::vector<int64_t> ids;
  for (int i = 0; i < 8; ++i) ids.push_back(world.pack(1000 + 300 * i));
  for (int pass = 0; pass < 3; ++pass)
    for (int i = 7; i >= 0; --i) {
      world.unpack(ids[i]);
      if (pass == 1) world.unpack(ids[i]);  // twice at the same time
      world.give_back(ids[i]);
      world.give_back(ids[i]);
    }
  require_clean(world);
}

// Streams beside the one that unpacks read what it was lent; and now and then another stream unpacks.
void borrowers(Schedule schedule, uint64_t seed) {
  std::mt19937_64 random(seed);
  World world({size_t(1) << 20, 1 + int(seed % 2)}, schedule, seed);
  for (int step = 0; step < 3; ++step) {
    std::vector<int64_t> ids;
    for (int i = 0; i < 9; ++i) ids.push_back(world.pack(2000 + random() % 2000));
    for (; !ids.empty(); ids.pop_back()) {
      world.backend->on_side = random() % 3 == 0;
      if (random() % 2) {
        world.borrow(ids.back());
      } else {
        world.unpack(ids.back());
        world.give_back(ids.back());
      }
      world.drop(ids.back());
    }
    world.backend->on_side = false;
  }
  require_clean(world);
}

// An allocator under pressure lets go of a graph, and so of records of the engine that asks for memory.
void let_go_while_allocating(Schedule schedule, uint64_t seed) {
  World world({size_t(1) << 20, 2}, schedule, seed);
  std::vector<int64_t> ids, graph;
  for (int i = 0; i < 12; ++i) (i % 3 == 1 ? graph : ids).push_back(world.pack(1000 + 100 * i));
  world.settle();
  world.backend->under_pressure = [&] {
    require(world.engine->stats().records > 0, "no record is left");
    if (graph.empty()) return;
    world.drop(graph.back());
    graph.pop_back();
  };
  for (; !ids.empty(); ids.pop_back()) {
    world.unpack(ids.back());
    world.give_back(ids.back());
    world.drop(ids.back());
  }
  require(graph.empty(), "nothing was let go while memory was allocated");
  require_clean(world);
}

void random_program(Schedule schedule, uint64_t seed) {
  std::mt19937_64 random(seed);
  auto below = [&](uint64_t n) { return random() % n; };
  Options options{below(4) ? size_t(1) << 20 : size_t(20000), int(below(4)), int(1 + below(3)), int(below(3)),
                  OnFull(below(3))};
  World world(options, schedule, seed);
  if (below(4) == 0) world.backend->pin_limit = world.backend->pinned + below(30000);
  if (below(8) == 0) world.backend->device_limit = below(20000);
  std::vector<int64_t> packed, lent;
  int64_t group = 0;
  auto attempt = [&](auto&& call) {
    try {
      call();
    } catch (const std::runtime_error&) {  // a full arena, a full device, an injected failure
    }
  };
  for (int n = 20 + below(60); n > 0; --n) {
    if (below(20) == 0) world.backend->copies_until_failure = 1 + below(3);
    switch (below(8)) {
      case 0:
      case 1:
      case 2:
        attempt([&] { packed.push_back(world.pack(below(10) ? 1 + below(6000) : 0, group += below(2))); });
        break;
      case 3:
      case 4:
      case 5: {
        if (packed.empty()) break;
        auto id = below(3) ? packed.back() : packed[below(packed.size())];
        attempt([&] {
          world.unpack(id);
          lent.push_back(id);
        });
        break;
      }
      case 6:
        if (lent.empty()) break;
        std::swap(lent[below(lent.size())], lent.back());
        world.give_back(lent.back());
        lent.pop_back();
        break;
      case 7:
        if (packed.empty()) break;
        if (below(4) == 0) std::swap(packed[below(packed.size())], packed.back());
        world.drop(packed.back());
        packed.pop_back();
    }
    require(world.engine->stats().records == int64_t(packed.size()), "a record leaked");
  }
  world.backend->copies_until_failure = 0;
  require_clean(world);
}

// Two threads share one engine, and loans die on a third: autograd's threads do the same.
void threads(uint64_t seed) {
  World world({size_t(1) << 20}, Schedule::threaded, seed);
  auto work = [&](uint64_t thread_seed) {
    std::mt19937_64 random(thread_seed);
    for (int step = 0; step < 5; ++step) {
      std::vector<int64_t> ids;
      for (int i = 0; i < 6; ++i) ids.push_back(world.pack(500 + random() % 4000));
      for (; !ids.empty(); ids.pop_back()) {
        world.unpack(ids.back());
        std::thread([&, id = ids.back()] { world.give_back(id); }).join();
        world.drop(ids.back());
      }
    }
  };
  std::thread first(work, seed), second(work, seed + 1);
  first.join();
  second.join();
  require_clean(world);
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t programs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 300;
  const char* names[] = {"threaded", "lazy", "seeded"};
  for (int s = 0; s < 3; ++s)
    for (uint64_t seed = 0; seed < programs; ++seed) {
      auto run = [&](const char* name, auto program) {
        context = std::string(name) + ", " + names[s] + ", seed " + std::to_string(seed);
        program(Schedule(s), seed);
      };
      if (seed < programs / 4 + 1) {
        run("in order", in_order);
        run("retain graph", retain_graph);
        run("borrowers", borrowers);
        run("let go while allocating", let_go_while_allocating);
      }
      run("random program", random_program);
    }
  for (uint64_t seed = 0; seed < programs / 10 + 1; ++seed) {
    context = "threads, seed " + std::to_string(seed);
    threads(seed);
  }
  std::printf("ok: %llu programs a schedule\n", static_cast<unsigned long long>(programs));
}
