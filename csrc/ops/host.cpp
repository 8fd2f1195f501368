// What the host asks before a call: the bytes that a head op allocates inside, for whoever plans memory, and the tokens
// that a pass visits, for a GPU that must not be asked. By the functions that the ops themselves use.
#include <algorithm>

#include "../cpu/cpu_head.h"
#include "../cuda/cuda_head.h"
#include "arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(longgrpo, m) {
  // Bytes of one pass. `multiprocessors` of the GPU, or 0 for the CPU; `beyond_logp`: a gradient of the entropy or of
  // the exact KL is wanted.
  m.def(
      "head_workspace(int tokens, int hidden, int vocabulary, ScalarType hidden_dtype, ScalarType weight_dtype, "
      "bool hidden_gradient, bool weight_gradient, bool reference, bool beyond_logp, int workspace, "
      "int multiprocessors) -> int");
  // (rows, columns) of the tiles that a measurement may choose among for one Tiling of cuda/plan.h, the device's own
  // choice first. The CPU has whole rows only.
  m.def(
      "candidate_tiles(int tokens, int hidden, int vocabulary, ScalarType hidden_dtype, ScalarType weight_dtype, "
      "bool weight_gradient, int tiling, int most, int workspace, int multiprocessors) -> int[]");
  // Token-level losses: the tokens [M] in the order of a pass, first the `active` ones that may have a gradient.
  m.def(
      "visited_rows(Tensor token_weight, Tensor advantages, int[] options, float[] constants, bool report) -> "
      "(Tensor rows, int active)");
}

namespace longgrpo {
namespace {

int64_t head_workspace(int64_t tokens, int64_t hidden, int64_t vocabulary, ScalarType hidden_dtype,
                       ScalarType weight_dtype, bool hidden_gradient, bool weight_gradient, bool reference,
                       bool beyond_logp, int64_t workspace, int64_t multiprocessors) {
  const HeadShape shape{tokens, hidden, vocabulary};
  const Dtype h = dtype_of(hidden_dtype), w = dtype_of(weight_dtype);
  if (tokens == 0) return 0;
  if (multiprocessors > 0)
    return cuda_workspace({shape, h, w, reference, hidden_gradient, weight_gradient, beyond_logp}, workspace,
                          {int(multiprocessors), 0});
  HeadInputs in{};
  in.hidden_dtype = h, in.weight_dtype = w;
  const HeadPlan plan = plan_cpu(shape, in, tokens, tokens, hidden_gradient, weight_gradient, reference,
                                 torch::stable::get_num_threads(), workspace);
  return workspace_bytes(plan, shape, plan.tile_rows);
}

std::vector<int64_t> tiles_to_try(int64_t tokens, int64_t hidden, int64_t vocabulary, ScalarType hidden_dtype,
                                  ScalarType weight_dtype, bool weight_gradient, int64_t tiling, int64_t most,
                                  int64_t workspace, int64_t multiprocessors) {
  const HeadShape shape{tokens, hidden, vocabulary};
  const Dtype h = dtype_of(hidden_dtype), w = dtype_of(weight_dtype);
  std::vector<int64_t> tiles;
  const auto add = [&](int64_t rows, int64_t columns) {
    if (int64_t(tiles.size()) < 2 * most) tiles.insert(tiles.end(), {rows, columns});
  };
  if (multiprocessors > 0) {
    const CudaWish wish{shape, h, w, false, true, weight_gradient, false};
    for (const CudaPlan& plan : candidate_tiles(wish, Tiling(tiling), workspace, {int(multiprocessors), 0}))
      add(plan.tile_rows, plan.tiling == Tiling::whole_rows ? 0 : plan.chunk);
    return tiles;
  }
  HeadInputs in{};
  in.hidden_dtype = h, in.weight_dtype = w;
  const int64_t rows =
      plan_cpu(shape, in, tokens, tokens, true, weight_gradient, false, torch::stable::get_num_threads(), workspace)
          .tile_rows;
  for (int64_t r = rows; r >= kMinTileRows; r /= 2) add(r, 0);
  return tiles;
}

std::tuple<Tensor, int64_t> visited_rows(const Tensor& token_weight, const Tensor& advantages,
                                         const std::vector<int64_t>& options, const std::vector<double>& constants,
                                         bool report) {
  const TokenBatch batch = token_batch(token_weight, advantages, {}, {}, {}, {});
  std::vector<float> visited(size_t(batch.tokens));
  const CpuRows rows = visit({loss_config(options, constants), batch, nullptr, {nullptr, 0}, report}, visited.data());
  Tensor order = torch::stable::new_empty(token_weight, {int64_t(rows.order.size())}, ScalarType::Long);
  std::copy(rows.order.begin(), rows.order.end(), static_cast<int64_t*>(order.mutable_data_ptr()));
  return {order, rows.active};
}

}  // namespace
}  // namespace longgrpo

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CompositeExplicitAutograd, m) {
  m.impl("head_workspace", LONGGRPO_BOX(&longgrpo::head_workspace));
  m.impl("candidate_tiles", LONGGRPO_BOX(&longgrpo::tiles_to_try));
  m.impl("visited_rows", LONGGRPO_BOX(&longgrpo::visited_rows));
}
