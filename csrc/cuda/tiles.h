// The tiles of every pass of a process: those that were chosen for a head, after a measurement (longgrpo.autotune), or
// else the model's, each worked out once.
#pragma once

#include <array>
#include <compare>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "../head/tile_choice.h"
#include "plan.h"
#include "score.h"

namespace longgrpo {

class Tiles {
 public:
  void choose(const HeadKey& head, const TileChoice& choice) {
    std::lock_guard lock(mutex_);
    choices_.insert_or_assign(head, choice);
  }

  // What is chosen serves calls of any length. Where it does not fit into the limit the model's serves.
  CudaPlan plan(const CudaWish& wish, Tiling tiling, int64_t limit_bytes, const Chip& chip) {
    std::lock_guard lock(mutex_);
    return locked_plan(wish, tiling, limit_bytes, chip);
  }

  bool splits(const CudaWish& wish, int64_t limit_bytes, const Chip& chip, bool c_in_row) {
    std::lock_guard lock(mutex_);
    const auto chosen = choices_.find(head_of(wish));
    const bool either = wish.weight_gradient && wish.can_chunk() && c_in_row;
    if (either && chosen != choices_.end() && chosen->second.passes != 0) return chosen->second.passes == 2;
    return longgrpo::splits(wish, limit_bytes, chip, c_in_row, [&](const CudaWish& w, Tiling tiling) {
      return locked_plan(w, tiling, limit_bytes, chip);
    });
  }

  // Of a call that scores and nothing else, if score.cu was measured to be faster.
  std::optional<ScorePlan> score_plan(const HeadShape& shape, const HeadInputs& in, int64_t limit_bytes,
                                      const Chip& chip) {
    if (!in.alone || !can_score(in, chip)) return {};
    std::lock_guard lock(mutex_);
    const auto chosen = choices_.find({shape.hidden, shape.vocabulary, in.hidden_dtype, in.weight_dtype});
    if (chosen == choices_.end() || !chosen->second.score) return {};
    return plan_score(shape, limit_bytes, chip);
  }

 private:
  static HeadKey head_of(const CudaWish& wish) {
    return {wish.shape.hidden, wish.shape.vocabulary, wish.hidden_dtype, wish.weight_dtype};
  }

  CudaPlan locked_plan(const CudaWish& wish, Tiling tiling, int64_t limit_bytes, const Chip& chip) {
    const HeadKey head = head_of(wish);
    if (const auto chosen = choices_.find(head); chosen != choices_.end() && !wish.reference) {
      const auto [rows, columns] = chosen->second.tiles[size_t(tiling)];
      const int64_t all = logits_columns(wish.shape);
      if (rows > 0) {
        const CudaPlan plan = plan_of(wish, tiling, std::min(rows, std::max(wish.shape.tokens, kMinTileRows)),
                                      tiling == Tiling::whole_rows || columns == 0 ? all : std::min(columns, all));
        if (plan.bytes <= limit_bytes) return plan;
      }
    }
    constexpr size_t kMost = 4096;
    const Key key{head,
                  {wish.shape.tokens, limit_bytes, chip.multiprocessors, int64_t(tiling), wish.reference,
                   wish.hidden_gradient, wish.weight_gradient, wish.beyond_logp}};
    if (const auto known = plans_.find(key); known != plans_.end()) return known->second;
    if (plans_.size() == kMost) plans_.clear();
    return plans_.emplace(key, best_tiles(wish, tiling, limit_bytes, chip)).first->second;
  }

  using Key = std::pair<HeadKey, std::array<int64_t, 8>>;
  std::mutex mutex_;
  std::map<HeadKey, TileChoice> choices_;
  std::map<Key, CudaPlan> plans_;
};

}  // namespace longgrpo
