// Times the loss on the CPU, without torch: the row kernels on a tile of logits, and the tile loop of the head.
#include <cstdlib>
#include <memory>
#include <numeric>

#include "bench.h"
#include "host_runtime.h"

using namespace longgrpo;

namespace {

constexpr int64_t kWorkspace = 256 << 20;
// Operations of one element as the code is written: exp is 22 of them.
constexpr double kReadFlops = 28, kSignFlops = 28;

struct Options {
  int64_t tokens = 512, hidden = 576, vocabulary = 32768;
  std::string dtype = "fp32", json;
  bool quick = false;
};

[[noreturn]] void usage(const std::string& problem) {
  std::fprintf(stderr,
               "%s\nbench_loss [--tokens N] [--hidden H] [--vocabulary V] [--dtype fp32|bf16|fp16] [--json FILE] "
               "[--quick]\n",
               problem.c_str());
  std::exit(2);
}

int64_t positive(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (value < 1 || *end != 0) usage(name + " must be a number >= 1, got '" + text + "'");
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (std::find(arguments.begin(), arguments.end(), "--quick") != arguments.end()) {
    options.tokens = 48, options.hidden = 64, options.vocabulary = 1000, options.quick = true;
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--quick") continue;
    if (i + 1 == arguments.size()) usage("unknown argument or no value: " + name);
    const std::string& value = arguments[++i];
    if (name == "--tokens")
      options.tokens = positive(name, value);
    else if (name == "--hidden")
      options.hidden = positive(name, value);
    else if (name == "--vocabulary")
      options.vocabulary = positive(name, value);
    else if (name == "--dtype")
      options.dtype = value;
    else if (name == "--json")
      options.json = value;
    else
      usage("unknown argument: " + name);
  }
  return options;
}

Dtype dtype_of(const std::string& name) {
  if (name == "fp32") return Dtype::f32;
  if (name == "bf16") return Dtype::bf16;
  if (name == "fp16") return Dtype::f16;
  usage("--dtype must be fp32, bf16 or fp16, got '" + name + "'");
}

// Uniform numbers of the given standard deviation; the same for the same seed.
std::vector<float> random_numbers(int64_t n, float deviation, uint64_t seed) {
  std::vector<float> out(static_cast<size_t>(n));
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (float& x : out) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x = deviation * 3.4641016f * (float(state >> 40) * 0x1p-24f - 0.5f);
  }
  return out;
}

std::vector<char> random_bytes(int64_t n, float deviation, uint64_t seed, Dtype dtype) {
  const std::vector<float> values = random_numbers(n, deviation, seed);
  std::vector<char> out(size_t(n * size_of(dtype)));
  from_float(values.data(), 1.0f, out.data(), dtype, n);
  return out;
}

// ---- ceilings ----

bench::Case matmul(bench::HostRuntime& runtime, int64_t n, Dtype dtype) {
  const bool native = dtype == Dtype::bf16 && bf16::supported();
  struct Buffers {
    std::vector<float> a, b, c;
    std::vector<char> workspace;
  };
  auto x = std::make_shared<Buffers>(Buffers{random_numbers(n * n, 1, 1), random_numbers(n * n, 1, 2),
                                             std::vector<float>(size_t(n * n)),
                                             std::vector<char>(size_t(bf16::workspace_bytes(runtime.threads()) + 64))});
  const auto run = [=, &runtime](int) {
    if (!native)
      return runtime.gemm(row_major(x->a.data(), n, n, n), row_major(x->b.data(), n, n, n),
                          row_major(x->c.data(), n, n, n));
    void* space = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(x->workspace.data()) + 63) & ~uintptr_t{63});
    // the floats' bits as bf16: any operand will do
    bf16::gemm(runtime, {x->a.data(), false, n, true, nullptr}, {x->b.data(), false, n, true, nullptr}, n, n, n, false,
               x->c.data(), n, space);
  };
  return {
      native ? "matmul bf16" : "matmul fp32", 2.0 * double(n) * double(n) * double(n), 12.0 * double(n * n), run, {}};
}

bench::Case copy(bench::HostRuntime& runtime, int64_t bytes) {
  auto from = std::make_shared<std::vector<char>>(size_t(bytes), char(1));
  auto to = std::make_shared<std::vector<char>>(size_t(bytes));
  constexpr int64_t block = 1 << 20;
  return {"copy",
          0,
          2.0 * double(bytes),
          [=, &runtime](int) {
            runtime.parallel_for((bytes + block - 1) / block, [&](int64_t i) {
              std::memcpy(to->data() + i * block, from->data() + i * block, size_t(std::min(block, bytes - i * block)));
            });
          },
          {}};
}

// ---- row kernels ----

struct LogitsTile {
  int64_t rows, vocabulary;
  std::vector<std::vector<float>> inputs;  // [kInputs][rows * vocabulary]
  std::vector<float> x;                    // the kernels work in place
  std::vector<RowStatistics> statistics;

  LogitsTile(int64_t r, int64_t v) : rows(r), vocabulary(v), x(size_t(r * v)), statistics(size_t(r)) {
    for (int i = 0; i < bench::kInputs; ++i) inputs.push_back(random_numbers(r * v, 3, uint64_t(i)));
  }
  float* row(int64_t i) { return x.data() + i * vocabulary; }
  int64_t target(int64_t i) const { return (i * 7919) % vocabulary; }
};

std::vector<bench::Case> row_cases(bench::HostRuntime& runtime, const std::shared_ptr<LogitsTile>& tile) {
  const double elements = double(tile->rows * tile->vocabulary);
  const auto restore = [=](int input) { tile->x = tile->inputs[size_t(input)]; };
  const auto read = [=, &runtime](bool keep) {
    runtime.parallel_for(tile->rows, [&](int64_t i) {
      tile->statistics[size_t(i)] = read_row(tile->row(i), tile->vocabulary, tile->target(i), 1.0f, true, keep);
    });
  };
  const auto sign = [=, &runtime](int) {
    const LogitTransform transform{tile->vocabulary, 1.0f, 0.0f, nullptr};
    runtime.parallel_for(tile->rows, [&](int64_t i) {
      sign_row(transform, tile->row(i), tile->target(i), tile->statistics[size_t(i)], {1, 0, 0}, {});
    });
  };
  return {
      {"read_row", kReadFlops * elements, 4 * elements, [=](int) { read(false); }, restore},
      {"read_row, row kept", kReadFlops * elements, 8 * elements, [=](int) { read(true); }, restore},
      {"sign_row", kSignFlops * elements, 8 * elements, sign, [=](int i) { restore(i), read(false); }},
  };
}

// ---- the tile loop ----

struct HeadBuffers {
  HeadShape shape;
  Dtype dtype;
  std::vector<std::vector<char>> hidden;  // [kInputs][tokens, hidden]
  std::vector<char> weight, direction;
  std::vector<int64_t> target;
  std::vector<float> c, logp, scale, dweight;

  HeadBuffers(const HeadShape& s, Dtype d)
      : shape(s),
        dtype(d),
        weight(random_bytes(s.vocabulary * s.hidden, 3.0f / std::sqrt(float(s.hidden)), 9, d)),
        direction(size_t(s.tokens * s.hidden * size_of(d))),
        c(size_t(s.tokens), 1e-3f),
        logp(size_t(s.tokens)),
        scale(size_t(s.tokens)),
        dweight(size_t(s.vocabulary * s.hidden)) {
    for (int i = 0; i < bench::kInputs; ++i) hidden.push_back(random_bytes(s.tokens * s.hidden, 1, uint64_t(i), d));
    for (int64_t t = 0; t < s.tokens; ++t) target.push_back((t * 7919) % s.vocabulary);
  }
};

bench::Case head_case(bench::HostRuntime& runtime, const std::shared_ptr<HeadBuffers>& b, bool gradient,
                      bool trains_head) {
  const double gemm = 2.0 * double(b->shape.tokens) * double(b->shape.hidden) * double(b->shape.vocabulary);
  const double hidden_bytes = double(b->direction.size()), weight_bytes = double(b->weight.size());
  const auto run = [=, &runtime](int input) {
    const HeadInputs in{b->hidden[size_t(input)].data(),
                        nullptr,
                        b->dtype,
                        b->weight.data(),
                        nullptr,
                        b->dtype,
                        b->target.data(),
                        nullptr,
                        1.0f,
                        {b->shape.vocabulary, 1.0f, 0.0f, nullptr},
                        ExactKl::none};
    HeadOutputs out{};
    out.logp = b->logp.data();
    if (gradient) out.direction = b->direction.data(), out.scale = b->scale.data();
    if (trains_head) out.dweight = b->dweight.data();
    const RowLoss loss{.kind = RowLoss::given, .c = b->c.data()};
    CpuDevice<bench::HostRuntime>(runtime, b->shape, kWorkspace).pass(in, out, loss);
  };
  const int gemms = 1 + gradient + trains_head;
  return {gemms == 1   ? "head, scoring"
          : gemms == 2 ? "head, frozen"
                       : "head, trainable",
          gemms * gemm,
          hidden_bytes * (1 + gradient) + weight_bytes + (trains_head ? 4.0 * double(b->dweight.size()) : 0.0),
          run,
          {}};
}

// A benchmark of wrong numbers is worth nothing: logp and the direction of one token against float64.
void check(const HeadBuffers& b, int input, int64_t token) {
  const int64_t h = b.shape.hidden, v = b.shape.vocabulary;
  const auto row = [&](const std::vector<char>& matrix, int64_t i) {
    std::vector<float> x(size_t(h), 0.0f);
    to_float(matrix.data() + i * h * size_of(b.dtype), b.dtype, x.data(), h);
    return x;
  };
  const std::vector<float> hidden = row(b.hidden[size_t(input)], token), got = row(b.direction, token);
  std::vector<double> p(size_t(v), 0.0), mean(size_t(h), 0.0);
  double sum = 0, error = 0, size = 0;
  for (int64_t j = 0; j < v; ++j) {
    const std::vector<float> w = row(b.weight, j);
    const double z = std::inner_product(w.begin(), w.end(), hidden.begin(), 0.0);
    sum += p[size_t(j)] = std::exp(z);
    for (int64_t k = 0; k < h; ++k) mean[size_t(k)] += p[size_t(j)] * double(w[size_t(k)]);
  }
  const int64_t target = b.target[size_t(token)];
  const double logp = std::log(p[size_t(target)] / sum);
  const std::vector<float> w = row(b.weight, target);
  for (size_t k = 0; k < size_t(h); ++k) {
    const double expected = double(w[k]) - mean[k] / sum;
    error += std::pow(double(got[k]) - expected, 2), size += expected * expected;
  }
  error = std::sqrt(error / size);
  if (!(std::fabs(double(b.logp[size_t(token)]) - logp) < 1e-3) || !(error < (b.dtype == Dtype::f32 ? 1e-4 : 2e-2)))
    throw std::runtime_error("token " + std::to_string(token) + ": logp " + std::to_string(b.logp[size_t(token)]) +
                             " where float64 says " + std::to_string(logp) + ", direction off by " +
                             std::to_string(error));
}

void run(const Options& options) {
  const Dtype dtype = dtype_of(options.dtype);
  const HeadShape shape{options.tokens, options.hidden, options.vocabulary};
  bench::HostRuntime runtime;
  bench::CacheFlush flush;
  bench::Report report(options.json);
  const bench::Effort effort = options.quick ? bench::Effort{3, 0} : bench::Effort{9, 1};

  const bool native = dtype == Dtype::bf16 && bf16::supported();
  const std::string about = "\"dtype\": \"" + options.dtype + "\", \"tokens\": " + std::to_string(shape.tokens) +
                            ", \"hidden\": " + std::to_string(shape.hidden) +
                            ", \"vocabulary\": " + std::to_string(shape.vocabulary) + ", \"gemm\": \"" +
                            (native ? "longgrpo bf16" : bench::HostRuntime::gemm_name) +
                            "\", \"threads\": " + std::to_string(omp_get_max_threads());
  std::printf("%s\n", about.c_str());
  report.header();
  const auto measure = [&](const bench::Case& c) { return bench::measure(c, effort, flush); };

  const bench::Case ceiling_cases[] = {matmul(runtime, options.quick ? 256 : 1024, dtype),
                                       copy(runtime, int64_t{options.quick ? 16 : 256} << 20)};
  const bench::Timing matmul_time = measure(ceiling_cases[0]), copy_time = measure(ceiling_cases[1]);
  const bench::Ceilings top{ceiling_cases[0].flops / matmul_time.fastest, ceiling_cases[1].bytes / copy_time.fastest};
  report.add(ceiling_cases[0], matmul_time, top, about);
  report.add(ceiling_cases[1], copy_time, top, about);

  const int64_t tile_rows = std::min<int64_t>(shape.tokens, 128);
  for (const bench::Case& c : row_cases(runtime, std::make_shared<LogitsTile>(tile_rows, shape.vocabulary)))
    report.add(c, measure(c), top, about);
  const auto buffers = std::make_shared<HeadBuffers>(shape, dtype);
  for (int gemms = 1; gemms <= 3; ++gemms) {
    const bench::Case c = head_case(runtime, buffers, gemms >= 2, gemms == 3);
    report.add(c, measure(c), top, about);
  }
  head_case(runtime, buffers, true, false).run(0);
  for (int64_t token : {int64_t{0}, shape.tokens - 1}) check(*buffers, 0, token);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
