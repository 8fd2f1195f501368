// The tiling of score.cu, for calls that score and nothing else: logits never reach memory. It is taken if
// runtime.score_plan says so, and the rule never does: only a measurement may, and only for HeadInputs::alone. No
// torch, no CUDA headers.
#pragma once

#include <optional>

#include "../head/head_pass.h"
#include "launch.h"

namespace longgrpo {

struct ScorePlan {
  int64_t tile_rows, splits;
  int64_t row_bytes;  // of workspace
  int64_t fixed_bytes;

  int64_t bytes() const { return tile_rows * row_bytes + fixed_bytes; }
};

constexpr int kScoreCapability = 80;  // the first to have its instructions

// Whether the kernel knows these operands and this card has its instructions.
inline bool can_score(const HeadInputs& in, const Chip& chip) {
  return in.hidden_dtype == in.weight_dtype && in.hidden_dtype != Dtype::f32 && !in.reference() &&
         chip.capability >= kScoreCapability;
}

// One wave of blocks a launch, two a multiprocessor: no more rows than L2 keeps the hidden states of, and the
// vocabulary split over the blocks that are left.
inline ScorePlan plan_score(const HeadShape& shape, int64_t limit_bytes, const Chip& chip) {
  constexpr int64_t kMostRows = 16 * kScoreTileRows, kBlocks = 2, kAlignment = 16;
  ScorePlan plan{0, 0, score_parts(shape.vocabulary) * kPartBytes + int64_t(sizeof(float)), kAlignment};
  check_workspace(limit_bytes, plan.row_bytes * kMinTileRows + plan.fixed_bytes);
  const int64_t fit = (limit_bytes - plan.fixed_bytes) / plan.row_bytes;
  plan.tile_rows = std::max(kMinTileRows, std::min({shape.tokens, kMostRows, fit}));
  if (plan.tile_rows > kScoreTileRows && plan.tile_rows < shape.tokens)
    plan.tile_rows -= plan.tile_rows % kScoreTileRows;
  const int64_t row_tiles = (plan.tile_rows + kScoreTileRows - 1) / kScoreTileRows;
  plan.splits = std::max<int64_t>(1, kBlocks * chip.multiprocessors / row_tiles);
  return plan;
}

template <class Runtime>
void score_pass(Runtime& runtime, const ScorePlan& plan, const HeadShape& shape, const HeadInputs& in,
                const HeadOutputs& out, const RowLoss& loss) {
  const auto memory = runtime.scratch(plan.bytes());
  auto* const parts = static_cast<PartSums*>(memory.data());
  auto* const target_x = reinterpret_cast<float*>(static_cast<char*>(memory.data()) +
                                                  kPartBytes * plan.tile_rows * score_parts(shape.vocabulary));
  for (int64_t begin = 0; begin < shape.tokens; begin += plan.tile_rows) {
    const RowTile tile{begin,
                       std::min(plan.tile_rows, shape.tokens - begin),
                       0,
                       nullptr,
                       nullptr,
                       in.transform,
                       in.token_temperature,
                       in.temperature,
                       in.target,
                       ExactKl::none,
                       loss};
    launch_score({tile, in.hidden, in.weight, shape.hidden, parts, target_x}, in.hidden_dtype, plan.splits,
                 {out.logp, out.entropy, nullptr, nullptr, nullptr}, runtime.stream());
  }
}

}  // namespace longgrpo
