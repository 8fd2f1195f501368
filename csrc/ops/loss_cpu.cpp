// The loss ops on the CPU: torch's fp32 GEMM, threads and memory.
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "../cpu/cpu_head.h"
#include "loss_ops.h"
#include "torch_runtime.h"

namespace longgrpo {
namespace {

// Large tensors are new to the process in every call. Faulting the workspace in by pages of 4 KiB costs a bf16 scoring
// pass of SmolLM2's head a third of its time.
void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

class CpuRuntime {
 public:
  explicit CpuRuntime(const Tensor& like) : like_(like) {}

  Tensor zeros(std::vector<int64_t> size, ScalarType dtype) const {
    Tensor tensor = empty(size, dtype);
    return torch::stable::zero_(tensor);
  }
  Tensor dweight(std::vector<int64_t> size, ScalarType) const { return empty(size, ScalarType::Float); }
  TorchScratch scratch(int64_t bytes) const { return TorchScratch(empty({bytes}, ScalarType::Byte)); }

  CpuDevice<CpuRuntime> device(const HeadShape& shape, int64_t workspace, int64_t /*active: the CPU looks*/) {
    return {*this, shape, workspace};
  }
  void check(const HeadInputs& in, const HeadShape& shape) const { check_targets(in.target, shape); }

  void gemm(const Matrix& a, const Matrix& b, const Matrix& c) const { torch_mm("out", view(a), view(b), view(c)); }

  int64_t threads() const { return torch::stable::get_num_threads(); }

  static void choose(const HeadKey& head, const TileChoice& choice) {
    std::lock_guard lock(choices_mutex());
    choices().insert_or_assign(head, choice.tiles[0].rows);
  }
  int64_t chosen_rows(const HeadKey& head) const {
    std::lock_guard lock(choices_mutex());
    const auto chosen = choices().find(head);
    return chosen == choices().end() ? 0 : chosen->second;
  }

  template <class F>
  void parallel_for(int64_t n, F&& f) const {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }

 private:
  Tensor empty(std::vector<int64_t> size, ScalarType dtype) const {
    Tensor tensor = torch::stable::new_empty(like_, size, dtype);
    advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * int64_t(tensor.element_size()));
    return tensor;
  }
  static Tensor view(const Matrix& m) {
    return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
  }

  static std::mutex& choices_mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::map<HeadKey, int64_t>& choices() {
    static std::map<HeadKey, int64_t> rows;
    return rows;
  }

  const Tensor like_;
};

using CpuOps = LossOps<CpuRuntime>;

// The logits that the passes of the head see, before its transform: [max(N, kMinTileRows), logits_stride], of which
// [N, V] are meant.
Tensor linear_logits(const Tensor& hidden, const Tensor& weight) {
  CpuRuntime runtime(hidden);
  const HeadShape shape{hidden.size(0), hidden.size(1), weight.size(0)};
  HeadInputs in{};
  in.hidden_dtype = dtype_of(hidden), in.weight_dtype = dtype_of(weight);
  const int64_t rows = std::max(shape.tokens, kMinTileRows), bytes = shape.hidden * size_of(in.hidden_dtype);
  const Tensor logits = torch::stable::new_empty(hidden, {rows, logits_stride(shape)}, ScalarType::Float);
  const auto memory = runtime.scratch(rows * shape.hidden * int64_t(sizeof(float)) + 2 * kLine +
                                      staging_bytes(shape, in, false, runtime.threads()));
  float* tile = aligned(static_cast<float*>(memory.data()));
  const auto source = [&](int64_t i) { return static_cast<const char*>(hidden.const_data_ptr()) + i * bytes; };
  tile_logits(runtime, shape, in, weight.const_data_ptr(), shape.tokens, source, tile, data(logits),
              logits_stride(shape), aligned(tile + rows * shape.hidden));
  return logits;
}

// linear_logprob from those logits [N, V], which are written over: logp [N].
Tensor logits_logprob(const Tensor& logits, const Tensor& target, const OptionalTensor& bias, const Tensor& temperature,
                      double softcap, double logit_scale) {
  CpuRuntime runtime(logits);
  const HeadShape shape{logits.size(0), 0, logits.size(1)};
  check_targets(static_cast<const int64_t*>(target.const_data_ptr()), shape);
  const LogitTransform transform{shape.vocabulary, float(logit_scale), float(softcap), pointer(bias)};
  const Tensor logp = runtime.zeros({shape.tokens}, ScalarType::Float);
  runtime.parallel_for(shape.tokens, [&](int64_t i) {
    float* x = data(logits) + i * logits.stride(0);
    const float factor = prepare_row(transform, read(temperature)[i], x);
    const int64_t at = static_cast<const int64_t*>(target.const_data_ptr())[i];
    data(logp)[i] = read_row(x, shape.vocabulary, at, factor, false, false).softmax.logp;
  });
  return logp;
}

}  // namespace
}  // namespace longgrpo

STABLE_TORCH_LIBRARY_FRAGMENT(longgrpo, m) {
  m.def("linear_logits(Tensor hidden, Tensor weight) -> Tensor");
  m.def(
      "logits_logprob(Tensor(a!) logits, Tensor target, Tensor? bias, Tensor temperature, float softcap, "
      "float logit_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CPU, m) {
  LONGGRPO_REGISTER_LOSS_OPS(m, longgrpo::CpuOps);
  m.impl("linear_logits", LONGGRPO_BOX(&longgrpo::linear_logits));
  m.impl("logits_logprob", LONGGRPO_BOX(&longgrpo::logits_logprob));
}
