// A benchmark harness: a case says what it does in flops and bytes, the harness says how near it came to the ceilings
// that it measured on this very device first.
//
// Before every timed run: the untimed preparation, another set of inputs than last time, and a cache that holds none of
// it. A time is a median with quartiles; a ceiling is the fastest run, which noise can only lower. A device other than
// the CPU brings a Clock of its own (CUDA events).
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bench {

constexpr int kInputs = 3;  // sets of inputs that take turns

struct Case {
  std::string name;
  double flops;
  double bytes;                      // that must move between memory and processor, at least
  std::function<void(int)> run;      // with inputs 0 ... kInputs - 1
  std::function<void(int)> prepare;  // untimed; may be empty
};

struct Timing {  // seconds
  double fastest, low, median, high;
};

struct Ceilings {  // a second
  double flops, bytes;
};

// The least time that the device allows.
inline double floor_of(const Case& c, const Ceilings& top) {
  return std::max(c.flops / top.flops, c.bytes / top.bytes);
}

inline Timing quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const double last = double(values.size() - 1);
  const auto at = [&](double position) { return values[size_t(position)]; };
  return {values.front(), at(std::floor(0.25 * last)), at(std::floor(0.5 * last)), at(std::ceil(0.75 * last))};
}

struct SteadyClock {
  std::chrono::steady_clock::time_point begin;
  void start() { begin = std::chrono::steady_clock::now(); }
  double stop() { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); }
};

// Writing more than the last-level cache holds leaves nothing else in it.
class CacheFlush {
 public:
  explicit CacheFlush(int64_t bytes = std::clamp<int64_t>(2 * sysconf(_SC_LEVEL3_CACHE_SIZE), 16 << 20, 256 << 20))
      : lines_(size_t(bytes)) {}
  void operator()() { std::fill(lines_.begin(), lines_.end(), ++value_); }

 private:
  std::vector<unsigned char> lines_;
  unsigned char value_ = 0;
};

struct Effort {
  int runs;        // at least
  double seconds;  // then until so much is spent
};

template <class Clock = SteadyClock>
Timing measure(const Case& c, const Effort& effort, CacheFlush& flush) {
  std::vector<double> times;
  double spent = 0;
  for (int i = -kInputs; i < effort.runs || spent < effort.seconds; ++i) {  // below 0: warm-up
    const int input = (i + kInputs) % kInputs;
    if (c.prepare) c.prepare(input);
    flush();
    Clock clock;
    clock.start();
    c.run(input);
    const double time = clock.stop();
    if (i >= 0) times.push_back(time), spent += time;
  }
  return quartiles(times);
}

// The table on stdout and, if a path is given, one JSON line a case. `about` is spliced into every line.
class Report {
 public:
  explicit Report(const std::string& path) : file_(path.empty() ? nullptr : std::fopen(path.c_str(), "w")) {
    if (!path.empty() && !file_) throw std::invalid_argument("cannot write " + path);
  }
  ~Report() {
    if (file_) std::fclose(file_);
  }
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  void header() const {
    std::printf("%-28s %10s %21s %10s %8s %10s %7s\n", "case", "ms", "[quartiles]", "GFLOP/s", "GB/s", "floor ms",
                "share");
  }

  void add(const Case& c, const Timing& t, const Ceilings& top, const std::string& about) {
    const double floor = floor_of(c, top), gflops = 1e-9 * c.flops / t.median, gbytes = 1e-9 * c.bytes / t.median;
    std::printf("%-28s %10.3f [%9.3f,%9.3f] %10.1f %8.1f %10.3f %6.1f%%\n", c.name.c_str(), 1e3 * t.median, 1e3 * t.low,
                1e3 * t.high, gflops, gbytes, 1e3 * floor, 100 * floor / t.median);
    if (!file_) return;
    std::fprintf(file_,
                 "{\"case\": \"%s\", \"ms\": %.6g, \"ms_low\": %.6g, \"ms_high\": %.6g, \"gflops\": %.6g, "
                 "\"gbytes\": %.6g, \"floor_ms\": %.6g, \"share\": %.4g, \"ceiling_gflops\": %.6g, "
                 "\"ceiling_gbytes\": %.6g, %s}\n",
                 c.name.c_str(), 1e3 * t.median, 1e3 * t.low, 1e3 * t.high, gflops, gbytes, 1e3 * floor,
                 floor / t.median, 1e-9 * top.flops, 1e-9 * top.bytes, about.c_str());
  }

 private:
  std::FILE* file_;
};

}  // namespace bench
