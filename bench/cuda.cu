// Times the CUDA path without torch: the row kernels on a tile of logits, and the tile loop of the head with cuBLAS.
//   bench_cuda [--tokens N] [--hidden H] [--vocabulary V] [--workspace MIB] [--cublas PATH] [--json FILE] [--about
//   JSON] [--rows R --columns C] [--candidates K]
// --rows and --columns force a tiling on every pass (columns are left out of whole rows). --candidates also times the K
// best tilings of each pass by the model of waves, each beside its share of the floor.
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <memory>

#include "bench.h"
#include "cublas.h"
#include "cuda/cuda_head.h"
#include "cuda/device.h"
#include "cuda/tiles.h"

using namespace longgrpo;

namespace {

// Operations of one column as sm_90a's machine code counts them, one exponential as one.
constexpr double kReadFlops = 12, kSignFlops = 4;

struct Options {
  int64_t tokens = 8192, hidden = 4096, vocabulary = 151936, workspace = 256, rows = 0, columns = 0, candidates = 0;
  std::string cublas = "libcublas.so.13", json, about = "\"device\": \"cuda\"";
};

Options parse(int argc, char** argv) {
  Options o;
  const std::map<std::string, int64_t*> numbers = {
      {"--tokens", &o.tokens},        {"--hidden", &o.hidden}, {"--vocabulary", &o.vocabulary},
      {"--workspace", &o.workspace},  {"--rows", &o.rows},     {"--columns", &o.columns},
      {"--candidates", &o.candidates}};
  const std::map<std::string, std::string*> texts = {
      {"--cublas", &o.cublas}, {"--json", &o.json}, {"--about", &o.about}};
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc || (!numbers.count(name) && !texts.count(name)))
      throw std::invalid_argument("unknown argument or no value: " + name);
    if (texts.count(name))
      *texts.at(name) = argv[i + 1];
    else if ((*numbers.at(name) = std::atoll(argv[i + 1])) < 1)
      throw std::invalid_argument(name + " must be a number >= 1");
  }
  return o;
}

class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) { check_cuda(cudaMalloc(&data_, size_t(bytes)), "cudaMalloc"); }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

struct EventClock {
  EventClock() { cudaEventCreate(&begin), cudaEventCreate(&end); }
  ~EventClock() { cudaEventDestroy(begin), cudaEventDestroy(end); }
  void start() { check_cuda(cudaEventRecord(begin), "cudaEventRecord"); }
  double stop() {
    float ms = 0;
    check_cuda(cudaEventRecord(end), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    check_cuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    return 1e-3 * ms;
  }
  cudaEvent_t begin, end;
};

template <class T>
__global__ void fill_random(T* to, int64_t n, float deviation, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t x = (uint64_t(i) + 1) * 0x9e3779b97f4a7c15u + seed * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u, x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    to[i] = T(deviation * 3.4641016f * (float(x >> 40) * 0x1p-24f - 0.5f));
  }
}

template <class T>
void randomize(const Memory& memory, float deviation, uint64_t seed) {
  fill_random<T><<<1024, 256>>>(memory.data<T>(), memory.bytes() / int64_t(sizeof(T)), deviation, seed);
  check_cuda(cudaGetLastError(), "fill_random");
}

// Leaves nothing of a case's inputs in L2.
void flush_device() {
  static const Memory other(512 << 20);
  check_cuda(cudaMemsetAsync(other.data(), 1, size_t(other.bytes())), "cudaMemset");
}

struct CublasRuntime {
  explicit CublasRuntime(const std::string& library) : blas(library), chip_(use_device(0)) {}

  const Chip& chip() const { return chip_; }
  Stream stream() const { return nullptr; }
  CudaPlan plan(const CudaWish& wish, Tiling tiling, int64_t limit_bytes) {
    return tiles.plan(wish, tiling, limit_bytes, chip_);
  }
  bool splits(const CudaWish& wish, int64_t limit_bytes, bool c_in_row) {
    return tiles.splits(wish, limit_bytes, chip_, c_in_row);
  }
  std::optional<ScorePlan> score_plan(const HeadShape& shape, const HeadInputs& in, int64_t limit_bytes) const {
    if (!scores_itself || !can_score(in, chip_)) return {};
    return plan_score(shape, limit_bytes, chip_);
  }
  void gemm(const Operand& a, const Operand& b, float* c, int64_t c_stride, bool add) const {
    blas.gemm(a, b, c, c_stride, add);
  }

  bool scores_itself = false;  // with score.cu's kernel in place of the library's GEMM

  // One allocation, kept, as torch's allocator would.
  struct Scratch {
    void* at;
    void* data() const { return at; }
  };
  Scratch scratch(int64_t bytes) {
    if (!memory_ || memory_->bytes() < bytes) memory_ = std::make_unique<Memory>(bytes);
    return {memory_->data()};
  }

  Tiles tiles;
  bench::Cublas blas;

 private:
  const Chip chip_;
  std::unique_ptr<Memory> memory_;
};

bench::Case matmul(const CublasRuntime& runtime, int64_t n) {
  auto a = std::make_shared<Memory>(2 * n * n), b = std::make_shared<Memory>(2 * n * n),
       c = std::make_shared<Memory>(4 * n * n);
  randomize<__nv_bfloat16>(*a, 1, 1), randomize<__nv_bfloat16>(*b, 1, 2);
  return {"matmul bf16",
          2.0 * double(n) * double(n) * double(n),
          8.0 * double(n * n),
          [=, &runtime](int) {
            runtime.gemm({a->data(), Dtype::bf16, n, n, n, 1}, {b->data(), Dtype::bf16, n, n, n, 1}, c->data<float>(),
                         n, false);
          },
          {}};
}

bench::Case copy(int64_t bytes) {
  auto from = std::make_shared<Memory>(bytes), to = std::make_shared<Memory>(bytes);
  randomize<float>(*from, 1, 1);
  return {"copy",
          0,
          2.0 * double(bytes),
          [=](int) {
            check_cuda(cudaMemcpyAsync(to->data(), from->data(), size_t(bytes), cudaMemcpyDeviceToDevice), "copy");
          },
          {}};
}

// ---- row kernels ----

std::vector<bench::Case> row_cases(const Options& o, const Chip& chip) {
  const int64_t stride = (o.vocabulary + kStrideUnit - 1) / kStrideUnit * kStrideUnit;
  const int64_t rows = std::min(o.tokens, std::max<int64_t>(1, (o.workspace << 20) / (4 * stride)));
  auto inputs = std::make_shared<std::vector<std::unique_ptr<Memory>>>();
  for (int i = 0; i < bench::kInputs; ++i) {
    inputs->push_back(std::make_unique<Memory>(4 * rows * stride));
    randomize<float>(*inputs->back(), 3, uint64_t(i));
  }
  auto x = std::make_shared<Memory>(4 * rows * stride);
  auto target = std::make_shared<Memory>(8 * rows), scores = std::make_shared<Memory>(4 * 4 * rows);
  std::vector<int64_t> targets;
  for (int64_t i = 0; i < rows; ++i) targets.push_back(i * 7919 % o.vocabulary);
  check_cuda(cudaMemcpy(target->data(), targets.data(), size_t(8 * rows), cudaMemcpyHostToDevice), "cudaMemcpy");
  const auto restore = [=](int i) {
    check_cuda(cudaMemcpyAsync(x->data(), (*inputs)[size_t(i)]->data(), size_t(x->bytes()), cudaMemcpyDeviceToDevice),
               "cudaMemcpy");
    flush_device();
  };
  const auto run = [=](bool gradient, Dtype dtype) {
    const RowTile tile{0,
                       rows,
                       stride,
                       x->data<float>(),
                       nullptr,
                       {o.vocabulary, 1, 0, nullptr},
                       nullptr,
                       1,
                       target->data<int64_t>(),
                       ExactKl::none,
                       {}};
    float* const s = scores->data<float>();
    launch_rows(tile, {s, s + rows, nullptr, s + 2 * rows, gradient ? s + 3 * rows : nullptr}, dtype, chip, nullptr);
  };
  const double elements = double(rows * o.vocabulary);
  return {{"rows, statistics", kReadFlops * elements, 4 * elements, [=](int) { run(false, Dtype::f32); }, restore},
          {"rows, signed bf16", (kReadFlops + kSignFlops) * elements, 6 * elements,
           [=](int) { run(true, Dtype::bf16); }, restore},
          {"rows, signed fp32", (kReadFlops + kSignFlops) * elements, 8 * elements, [=](int) { run(true, Dtype::f32); },
           restore}};
}

// ---- the tile loop ----

struct HeadBuffers {
  explicit HeadBuffers(const Options& o)
      : shape{o.tokens, o.hidden, o.vocabulary},
        weight(2 * o.vocabulary * o.hidden),
        direction(2 * o.tokens * o.hidden),
        dweight(4 * o.vocabulary * o.hidden),
        target(8 * o.tokens),
        scores(16 * o.tokens) {
    randomize<__nv_bfloat16>(weight, 3.0f / std::sqrt(float(o.hidden)), 9);
    for (int i = 0; i < bench::kInputs; ++i) {
      hidden.push_back(std::make_unique<Memory>(2 * o.tokens * o.hidden));
      randomize<__nv_bfloat16>(*hidden.back(), 1, uint64_t(i));
    }
    std::vector<int64_t> targets;
    for (int64_t t = 0; t < o.tokens; ++t) targets.push_back(t * 7919 % o.vocabulary);
    check_cuda(cudaMemcpy(target.data(), targets.data(), size_t(8 * o.tokens), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  HeadShape shape;
  std::vector<std::unique_ptr<Memory>> hidden;
  Memory weight, direction, dweight, target, scores;
};

bench::Case head_case(CublasRuntime& runtime, const std::shared_ptr<HeadBuffers>& b, const std::string& name,
                      bool gradient, bool trains_head, int64_t workspace, bool scores_itself = false) {
  const auto [n, h, v] = b->shape;
  const double gemm = 2.0 * double(n) * double(h) * double(v);
  const auto run = [=, &runtime](int input) {
    const HeadInputs in{b->hidden[size_t(input)]->data(),
                        nullptr,
                        Dtype::bf16,
                        b->weight.data(),
                        nullptr,
                        Dtype::bf16,
                        b->target.data<int64_t>(),
                        nullptr,
                        1.0f,
                        {b->shape.vocabulary, 1, 0, nullptr},
                        ExactKl::none};
    float* const scores = b->scores.data<float>();
    const HeadOutputs out{.logp = scores,
                          .direction = gradient ? b->direction.data() : nullptr,
                          .scale = gradient ? scores + b->shape.tokens : nullptr,
                          .dweight = trains_head ? b->dweight.data<float>() : nullptr};
    runtime.scores_itself = scores_itself;
    const CudaDevice<CublasRuntime> device(runtime, b->shape, workspace, b->shape.tokens);
    if (!trains_head || !device.weight_by_itself(in, out, false, true)) return device.pass(in, out, RowLoss{});
    HeadOutputs first = out, weight{.logp = out.logp, .dweight = out.dweight};
    first.dweight = nullptr;
    first.normalizer = weight.normalizer = reinterpret_cast<RowNormalizer*>(scores + 2 * b->shape.tokens);
    device.pass(in, first, RowLoss{});
    device.weight_pass(in, weight, out.scale, {b->shape.tokens});
  };
  const double hidden_bytes = double(b->direction.bytes()), weight_bytes = double(b->weight.bytes());
  const double bytes =
      hidden_bytes + weight_bytes + gradient * (hidden_bytes + weight_bytes) + trains_head * 2 * weight_bytes;
  return {name, gemm * (1 + gradient + trains_head), bytes, run, [](int) { flush_device(); }};
}

// add(case, about): a frozen head in each of its best tilings, and a trained one with each for its weight's gradient
// and in each of whole rows.
template <class Add>
void time_candidates(const Options& o, CublasRuntime& runtime, const std::shared_ptr<HeadBuffers>& buffers, Add&& add) {
  const int64_t workspace = o.workspace << 20;
  const HeadKey head{o.hidden, o.vocabulary, Dtype::bf16, Dtype::bf16};
  for (const Tiling tiling : {Tiling::chunks, Tiling::weight, Tiling::whole_rows}) {
    const bool trained = tiling != Tiling::chunks;
    const CudaWish wish{buffers->shape, Dtype::bf16, Dtype::bf16, false, true, trained, false};
    if (tiling == Tiling::whole_rows && tile_bytes(wish, tiling, kMinTileRows, logits_columns(wish.shape)) > workspace)
      continue;
    std::vector<CudaPlan> plans = candidate_tiles(wish, tiling, workspace, runtime.chip());
    plans.resize(std::min(plans.size(), size_t(o.candidates)));
    for (const CudaPlan& plan : plans) {
      TileChoice choice;
      choice.tiles[size_t(tiling)] = {plan.tile_rows, plan.chunk};
      choice.passes = tiling == Tiling::whole_rows ? 1 : 2;
      runtime.tiles.choose(head, choice);
      const std::string tile = std::to_string(plan.tile_rows) + " x " + std::to_string(plan.chunk);
      add(head_case(runtime, buffers, (trained ? "head, trained, " : "head, frozen, ") + tile, true, trained,
                    workspace),
          ", \"rows\": " + std::to_string(plan.tile_rows) + ", \"columns\": " + std::to_string(plan.chunk));
    }
  }
  runtime.tiles.choose(head, {});
}

}  // namespace

int main(int argc, char** argv) try {
  const Options o = parse(argc, argv);
  CublasRuntime runtime(o.cublas);
  bench::CacheFlush flush(0);  // of the host's cache, which no case reads: each flushes the device's own
  const bench::Effort effort{10, 1.0};
  const auto measure = [&](const bench::Case& c) { return bench::measure<EventClock>(c, effort, flush); };

  const bench::Case product = matmul(runtime, 8192), moved = copy(int64_t(1) << 30);
  const bench::Ceilings top{product.flops / measure(product).median, moved.bytes / measure(moved).median};
  std::printf("ceilings: %.0f TFLOP/s (matmul bf16), %.2f TB/s (copy)\n", 1e-12 * top.flops, 1e-12 * top.bytes);

  bench::Report report(o.json);
  report.header();
  for (const bench::Case& c : row_cases(o, runtime.chip())) report.add(c, measure(c), top, o.about);
  const auto buffers = std::make_shared<HeadBuffers>(o);
  const int64_t workspace = o.workspace << 20;
  TileChoice forced;
  if (o.rows > 0) forced.tiles.fill({o.rows, o.columns});
  runtime.tiles.choose({o.hidden, o.vocabulary, Dtype::bf16, Dtype::bf16}, forced);
  std::vector<bench::Case> cases = {head_case(runtime, buffers, "head, scoring", false, false, workspace),
                                    head_case(runtime, buffers, "head, frozen", true, false, workspace),
                                    head_case(runtime, buffers, "head, trained", true, true, workspace)};
  if (runtime.chip().capability >= kScoreCapability)
    cases.push_back(head_case(runtime, buffers, "head, scoring, tensor cores", false, false, workspace, true));
  for (const bench::Case& c : cases) report.add(c, measure(c), top, o.about);
  if (o.candidates > 0)
    time_candidates(o, runtime, buffers, [&](const bench::Case& c, const std::string& about) {
      report.add(c, measure(c), top, o.about + about);
    });
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "bench_cuda: %s\n", error.what());
  return 1;
}
