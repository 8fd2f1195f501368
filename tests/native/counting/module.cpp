// The real tile loops over kernels and a GEMM that count: launches, GEMMs, bytes and waves of a pass of any size. A
// launch reads each operand and writes each result once; what is added to is read too. Nothing is computed, so pointers
// may be anything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "cuda/cuda_head.h"
#include "cuda/tiles.h"
#include "head/fused_loss.h"

namespace py = pybind11;
using namespace longgrpo;

namespace {

struct Count {
  int64_t launches = 0, gemms = 0, workspace = 0;  // workspace: the most at a time
  double bytes = 0, multiply_adds = 0;
  double time = 0, filled = 0;  // of GEMMs: tiles of an output times their depth, in whole waves, and those that work
};

Count count;
Chip chip{132, 227 << 10, 90};
int64_t held = 0;
Tiles tiles;

void launched(double bytes) { ++count.launches, count.bytes += bytes; }

double numbers(const RowTile& tile, int64_t columns) { return double(tile.rows) * double(columns); }

struct Scratch {
  explicit Scratch(int64_t bytes) : bytes(bytes) {
    held += bytes;
    count.workspace = std::max(count.workspace, held);
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { held -= bytes; }
  void* data() const { return reinterpret_cast<void*>(uintptr_t{1} << 20); }
  int64_t bytes;
};

struct CountingRuntime {
  const Chip& chip() const { return ::chip; }
  Stream stream() const { return nullptr; }
  Scratch scratch(int64_t bytes) const { return Scratch(bytes); }
  CudaPlan plan(const CudaWish& wish, Tiling tiling, int64_t limit) const {
    return tiles.plan(wish, tiling, limit, ::chip);
  }
  std::optional<ScorePlan> score_plan(const HeadShape& shape, const HeadInputs& in, int64_t limit) const {
    return tiles.score_plan(shape, in, limit, ::chip);
  }
  bool splits(const CudaWish& wish, int64_t limit, bool c_in_row) const {
    return tiles.splits(wish, limit, ::chip, c_in_row);
  }
  void gemm(const Operand& a, const Operand& b, float*, int64_t, bool add) const {
    const double m = double(a.rows), n = double(b.columns), k = double(a.columns);
    launched(m * k * double(size_of(a.dtype)) + k * n * double(size_of(b.dtype)) + (add ? 8 : 4) * m * n);
    ++count.gemms, count.multiply_adds += m * n * k;
    const int64_t tiles = ceil_divide(a.rows, 128) * ceil_divide(b.columns, 256);
    count.time += double(ceil_divide(tiles, ::chip.multiprocessors) * ::chip.multiprocessors) * k;
    count.filled += double(tiles) * k;
  }
};

py::dict result() {
  py::dict d;
  d["launches"] = count.launches, d["gemms"] = count.gemms, d["bytes"] = count.bytes;
  d["multiply_adds"] = count.multiply_adds, d["workspace"] = count.workspace;
  d["part_filled"] = count.time > 0 ? 1 - count.filled / count.time : 0.0;
  return d;
}

}  // namespace

namespace longgrpo {

Chip use_device(int) { return ::chip; }

void launch_rows(const RowTile& tile, const RowOutputs& out, Dtype dtype, const Chip&, Stream) {
  const double n = numbers(tile, tile.transform.vocabulary);
  launched(n * (tile.reference_logits ? 8 : 4) + (out.row_scale ? n * double(size_of(dtype)) : 0));
}

void launch_chunk(const RowTile& tile, int64_t, int64_t columns, const Chunks& chunks, Dtype dtype, Stream) {
  const double n = numbers(tile, columns);
  launched(4 * n + (chunks.sums ? n * double(size_of(dtype)) : 0) + n * kPartBytes / kSegment);
}

void launch_finish(const RowTile& tile, const RowOutputs&, const Chunks& chunks, const Direction& direction, Stream) {
  const double parts = numbers(tile, chunks.segments) * kPartBytes, n = numbers(tile, chunks.hidden);
  launched(parts + (chunks.sums ? n * double(4 + size_of(direction.weight_dtype) + size_of(direction.dtype)) : 0));
}

void launch_score(const ScoreTile& in, Dtype dtype, int64_t, const RowOutputs&, Stream) {
  const double v = double(in.tile.transform.vocabulary);
  launched(double(in.hidden_size) * (double(in.tile.rows) + v) * double(size_of(dtype)));
}

void launch_weight_rows(const RowTile& tile, int64_t, int64_t columns, const float*, const float*, const RowNormalizer*,
                        Dtype dtype, Stream) {
  launched(numbers(tile, columns) * double(4 + size_of(dtype)));
}

void launch_scale_rows(const void*, Dtype from, void*, Dtype to, const float*, int64_t rows, int64_t columns, Stream) {
  launched(double(rows) * double(columns) * double(size_of(from) + size_of(to)));
}
void launch_add(float*, const float*, const float*, int64_t n, Stream) { launched(12.0 * double(n)); }
void launch_scale(const float*, void*, Dtype dtype, const float*, int64_t n, Stream) {
  launched(double(n) * double(4 + size_of(dtype)));
}
void launch_add_columns(float*, const void*, Dtype dtype, const float*, const float*, int64_t rows, int64_t columns,
                        int64_t, Stream) {
  launched(double(rows) * double(columns) * double(size_of(dtype)) + 8.0 * double(columns));
}
void launch_normalize(const float*, float*, float*, int64_t n, Stream) { launched(12.0 * double(n)); }

// Of a number a token each.
void launch_visited(const Visits& visits, float*, Stream) { launched(12.0 * double(visits.batch.tokens)); }
void launch_correct(const LossArguments& a, float*, float*, Stream) { launched(16.0 * double(a.batch.tokens)); }
int64_t loss_partials(const LossArguments&) { return 1; }
void launch_token_loss(const LossArguments& a, LossSums*, const LossOutputs&, Stream) {
  launched(24.0 * double(a.batch.tokens));
  launched(0);
}

}  // namespace longgrpo

PYBIND11_MODULE(longgrpo_counting, m) {
  m.def(
      "set_chip",
      [](int multiprocessors, int capability) { chip.multiprocessors = multiprocessors, chip.capability = capability; },
      py::arg("multiprocessors"), py::arg("capability") = 90);

  // TileChoice::unpack's numbers for a head; none: the rule's.
  m.def("choose", [](int64_t h, int64_t v, int dtype, const std::vector<int64_t>& choice) {
    tiles.choose({h, v, Dtype(dtype), Dtype(dtype)}, TileChoice::unpack(choice));
  });

  // One call of linear_grpo_loss, or without a gradient of linear_logprob. dtype: 0 f32, 1 bf16, 2 f16.
  m.def(
      "loss",
      [](int64_t n, int64_t h, int64_t v, int dtype, bool hidden, bool weight, double entropy_coef, bool sequence_level,
         int64_t workspace, bool alone) {
        count = {}, held = 0;
        CountingRuntime runtime;
        CudaDevice<CountingRuntime> device(runtime, {n, h, v}, workspace, n);
        void* const some = reinterpret_cast<void*>(uintptr_t{1} << 20);
        float* const f = static_cast<float*>(some);
        const HeadInputs in{
            some,    nullptr, Dtype(dtype),       some,          nullptr, Dtype(dtype), static_cast<int64_t*>(some),
            nullptr, 1,       {v, 1, 0, nullptr}, ExactKl::none, alone};
        HeadOutputs out{.logp = f, .entropy = f};
        if (!hidden && !weight) {
          device.pass(in, out, RowLoss{});
          return result();
        }
        if (hidden) out.direction = some, out.scale = f;
        if (weight) out.dweight = some, out.dweight_dtype = Dtype(dtype) == Dtype::bf16 ? Dtype::bf16 : Dtype::f32;
        LossConfig config{};
        config.entropy_coef = float(entropy_coef);
        config.sequence_level = sequence_level;
        const TokenBatch batch{n, f, f, nullptr, nullptr, nullptr, nullptr};
        FusedLoss(device, config, {n, h, v}, in, batch, {static_cast<int32_t*>(some), 1}, out, true)
            .run({f, static_cast<LossMetrics*>(some)});
        return result();
      },
      py::arg("n"), py::arg("h"), py::arg("v"), py::kw_only(), py::arg("dtype") = 1, py::arg("hidden") = true,
      py::arg("weight") = false, py::arg("entropy_coef") = 0.0, py::arg("sequence_level") = false,
      py::arg("workspace") = int64_t{256} << 20, py::arg("alone") = false);
}
