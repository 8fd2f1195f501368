// The kernels on the simulator, and the whole tile loop on a simulated device, for Python. Arrays are addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "cuda/cuda_head.h"
#include "cuda/numbers.cuh"
#include "head/fused_loss.h"

namespace py = pybind11;
using namespace longgrpo;

namespace {

constexpr int kCapability = 80;
Chip chip{4, 100 << 10, kCapability};
int64_t forced_rows = 0, forced_chunk = 0;  // 0: what the rule says
int64_t forced_splits = -1;                 // of score.cu's kernel; 0: as its plan says, -1: another kernel
int64_t multiply_adds = 0;                  // of all GEMMs so far

float element(const Operand& m, int64_t i, int64_t j) {
  const int64_t offset = i * m.row_stride + j * m.column_stride;
  if (m.dtype == Dtype::f32) return static_cast<const float*>(m.data)[offset];
  if (m.dtype == Dtype::bf16) return widen(static_cast<const Bf16*>(m.data)[offset]);
  return widen(static_cast<const Half*>(m.data)[offset]);
}

std::vector<float> unpacked(const Operand& m) {
  std::vector<float> out(size_t(m.rows * m.columns));
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.columns; ++j) out[size_t(i * m.columns + j)] = element(m, i, j);
  return out;
}

// Memory of exactly so many bytes that holds NaN until it is written.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(new char[size_t(bytes)]) {
    std::memset(memory_.get(), 0xff, size_t(bytes));
  }
  void* data() const { return memory_.get(); }

 private:
  std::unique_ptr<char[]> memory_;
};

struct SimulatedRuntime {
  const Chip& chip() const { return ::chip; }
  Stream stream() const { return nullptr; }
  Scratch scratch(int64_t bytes) { return Scratch(bytes); }

  // Forced: whole rows wherever they are possible, or chunks wherever those are.
  CudaPlan plan(const CudaWish& wish, Tiling tiling, int64_t limit_bytes) {
    if (forced_rows == 0) return best_tiles(wish, tiling, limit_bytes, ::chip);
    const int64_t all = logits_columns(wish.shape);
    const int64_t chunk = tiling == Tiling::whole_rows || forced_chunk == 0 ? all : std::min(forced_chunk, all);
    return {tiling, forced_rows, chunk, chunk, tile_bytes(wish, tiling, forced_rows, chunk)};
  }
  bool splits(const CudaWish& wish, int64_t limit_bytes, bool c_in_row) {
    if (forced_rows == 0) return longgrpo::splits(wish, limit_bytes, ::chip, c_in_row);
    return forced_chunk && wish.weight_gradient && wish.can_chunk();
  }

  std::optional<ScorePlan> score_plan(const HeadShape& shape, const HeadInputs& in, int64_t limit_bytes) const {
    if (forced_splits < 0 || !can_score(in, ::chip)) return {};
    ScorePlan plan = plan_score(shape, limit_bytes, ::chip);
    if (forced_splits > 0) plan.splits = forced_splits;
    return plan;
  }

  void gemm(const Operand& a, const Operand& b, float* c, int64_t c_stride, bool add) {
    multiply_adds += a.rows * a.columns * b.columns;
    const std::vector<float> x = unpacked(a), y = unpacked(b);
    std::vector<double> row(size_t(b.columns));
    for (int64_t i = 0; i < a.rows; ++i) {
      std::fill(row.begin(), row.end(), 0.0);
      if (add) std::copy_n(c + i * c_stride, b.columns, row.begin());
      for (int64_t k = 0; k < a.columns; ++k) {
        const double factor = x[size_t(i * a.columns + k)];
        const float* const from = &y[size_t(k * b.columns)];
        for (int64_t j = 0; j < b.columns; ++j) row[size_t(j)] += factor * from[j];
      }
      std::copy(row.begin(), row.end(), c + i * c_stride);
    }
  }
};

SimulatedRuntime runtime;

template <class T = float>
T* pointer(const py::dict& d, const char* name) {
  if (!d.contains(name) || d[name].is_none()) return nullptr;
  return reinterpret_cast<T*>(d[name].cast<uintptr_t>());
}

Dtype dtype_of(const py::dict& d, const char* name) { return Dtype(d[name].cast<int>()); }

HeadShape shape_of(const py::dict& d) {
  return {d["tokens"].cast<int64_t>(), d["hidden_size"].cast<int64_t>(), d["vocabulary"].cast<int64_t>()};
}

HeadInputs inputs_of(const py::dict& d) {
  const int64_t v = d["vocabulary"].cast<int64_t>();
  return {pointer<void>(d, "hidden"),
          pointer<void>(d, "ref_hidden"),
          dtype_of(d, "hidden_dtype"),
          pointer<void>(d, "weight"),
          pointer<void>(d, "ref_weight") ? pointer<void>(d, "ref_weight") : pointer<void>(d, "weight"),
          dtype_of(d, "weight_dtype"),
          pointer<int64_t>(d, "target"),
          pointer(d, "token_temperature"),
          d["temperature"].cast<float>(),
          {v, d["logit_scale"].cast<float>(), d["softcap"].cast<float>(), pointer(d, "bias")},
          ExactKl(d["exact_kl"].cast<int>())};
}

HeadOutputs outputs_of(const py::dict& d) {
  return {pointer(d, "logp"),
          pointer(d, "entropy"),
          pointer(d, "kl"),
          pointer<void>(d, "direction"),
          pointer(d, "scale"),
          pointer<void>(d, "dweight"),
          dtype_of(d, "dweight_dtype"),
          pointer(d, "dbias"),
          pointer<RowNormalizer>(d, "normalizer")};
}

TokenBatch batch_of(const py::dict& d) {
  return {d["tokens"].cast<int64_t>(), pointer(d, "token_weight"), pointer(d, "advantages"),   pointer(d, "old_logp"),
          pointer(d, "ref_logp"),      pointer(d, "importance"),   pointer(d, "sampling_logp")};
}

Sequences sequences_of(const py::dict& d) {
  return {pointer<int32_t>(d, "cu_seqlens"), d["sequences"].cast<int64_t>()};
}

LossOutputs loss_of(const py::dict& d) { return {pointer(d, "loss"), pointer<LossMetrics>(d, "metrics")}; }

CudaDevice<SimulatedRuntime> device_of(const py::dict& d, int64_t active = 0) {
  return {runtime, shape_of(d), d["workspace"].cast<int64_t>(), active};
}

// One launch of the row kernel over logits [rows, stride].
void rows(const py::dict& d) {
  const HeadInputs in = inputs_of(d);
  RowTile tile{0,
               d["tokens"].cast<int64_t>(),
               d["stride"].cast<int64_t>(),
               pointer(d, "logits"),
               pointer(d, "reference_logits"),
               in.transform,
               in.token_temperature,
               in.temperature,
               in.target,
               in.exact_kl,
               {}};
  if (pointer(d, "c")) tile.loss.kind = RowLoss::given, tile.loss.c = pointer(d, "c"), tile.loss.e = pointer(d, "e");
  const HeadOutputs out = outputs_of(d);
  launch_rows(tile, {out.logp, out.entropy, out.kl, out.scale, pointer(d, "row_scale")}, dtype_of(d, "out_dtype"), chip,
              nullptr);
}

}  // namespace

namespace longgrpo {
Chip use_device(int) { return ::chip; }
}  // namespace longgrpo

PYBIND11_MODULE(longgrpo_kernels, m) {
  m.def("set_schedule", [](int schedule) { sim::schedule = sim::Schedule(schedule); });
  m.def(
      "set_chip",
      [](int multiprocessors, int64_t shared, int capability) { chip = {multiprocessors, shared, capability}; },
      py::arg("multiprocessors"), py::arg("shared"), py::arg("capability") = kCapability);
  m.def("force_score", [](int64_t splits) { forced_splits = splits; });
  m.def("shared_accesses", [] { return std::make_pair(sim::shared_accesses.warps, sim::shared_accesses.conflicts); });
  m.def("score_plan", [](int64_t n, int64_t h, int64_t v, int64_t workspace) {
    const ScorePlan p = plan_score({n, h, v}, workspace, chip);
    return std::make_tuple(p.tile_rows, p.splits, p.bytes());
  });
  m.def("force_tiles", [](int64_t rows, int64_t chunk) { forced_rows = rows, forced_chunk = chunk; });
  m.def("multiply_adds", [] { return multiply_adds; });
  m.def("launches", [] { return sim::launches; });
  m.def("launched", [] { return sim::launched; });
  m.def("rows", rows);
  m.def("plan", [](int64_t n, int64_t h, int64_t v, int dtype, bool trains, int64_t workspace) {
    const CudaWish wish{{n, h, v}, Dtype(dtype), Dtype(dtype), false, true, trains, false};
    const CudaPlan p = plan_cuda(wish, workspace, chip);
    return std::make_tuple(splits(wish, workspace, chip, true), p.tile_rows, p.chunk,
                           cuda_workspace(wish, workspace, chip));
  });
  m.def("linear_logprob", [](const py::dict& d) { device_of(d).pass(inputs_of(d), outputs_of(d), RowLoss{}); });
  m.def("linear_logprob_backward", [](const py::dict& d) {
    const RowLoss loss{.kind = RowLoss::given, .c = pointer(d, "c"), .e = pointer(d, "e")};
    const HeadOutputs out = outputs_of(d);
    if (out.normalizer) return device_of(d).weight_pass(inputs_of(d), out, loss.c, {shape_of(d).tokens});
    device_of(d).pass(inputs_of(d), out, loss);
  });
  m.def("token_loss", [](const py::dict& d, const std::vector<int64_t>& options, const std::vector<float>& constants) {
    const TokenBatch batch = batch_of(d);
    CudaDevice<SimulatedRuntime> device(runtime, {batch.tokens, 0, 0}, 0, 0);
    token_loss(device,
               {unpack_config(options, constants), batch, sequences_of(d), pointer(d, "logp"), pointer(d, "entropy"),
                nullptr, pointer(d, "logp_grad")},
               loss_of(d));
  });
  m.def("linear_grpo_loss", [](const py::dict& d, const std::vector<int64_t>& options,
                               const std::vector<float>& constants, int64_t active, bool report) {
    auto device = device_of(d, active);
    const LossConfig config = unpack_config(options, constants);
    HeadInputs in = inputs_of(d);
    in.exact_kl = exact_kl_of(config);
    FusedLoss(device, config, shape_of(d), in, batch_of(d), sequences_of(d), outputs_of(d), report).run(loss_of(d));
  });
  m.def("scale_rows",
        [](uintptr_t from, int from_dtype, uintptr_t to, int to_dtype, uintptr_t scale, int64_t rows, int64_t columns) {
          launch_scale_rows(reinterpret_cast<void*>(from), Dtype(from_dtype), reinterpret_cast<void*>(to),
                            Dtype(to_dtype), reinterpret_cast<float*>(scale), rows, columns, nullptr);
        });
}
