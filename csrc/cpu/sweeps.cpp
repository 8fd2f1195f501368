#include "sweeps.h"

namespace longgrpo {

CpuRows visit(const Visits& visits, float* weight) {
  CpuRows rows{{}, 0};
  std::vector<int64_t> quiet;
  const auto visit = [&](int64_t begin, int64_t end, bool moves) {
    for (int64_t t = begin; t < end; ++t) {
      weight[t] = visits.weight(t, moves);
      if (weight[t] != 0) (moves ? rows.order : quiet).push_back(t);
    }
  };
  if (visits.batch.needs_sequence(visits.config)) {
    const int32_t* bounds = visits.sequences.bounds;
    for (int64_t s = 0; s < visits.sequences.count; ++s)
      visit(bounds[s], bounds[s + 1], visits.sequence_moves(OneThread{}, bounds[s], bounds[s + 1]));
  } else {
    for (int64_t t = 0; t < visits.batch.tokens; ++t) visit(t, t + 1, visits.moves(t));
  }
  rows.active = int64_t(rows.order.size());
  rows.order.insert(rows.order.end(), quiet.begin(), quiet.end());
  return rows;
}

CpuRows rows_of(const RowLoss& loss, const int64_t* target, int64_t tokens) {
  CpuRows rows{{}, 0};
  for (int64_t t = 0; t < tokens; ++t)
    if (target[t] >= 0 && !loss.skips(t)) rows.order.push_back(t);
  rows.active = int64_t(rows.order.size());
  return rows;
}

void correct(const LossArguments& arguments, float* sequence_ratio, float* kept) {
  const int32_t* bounds = arguments.sequences.bounds;
  for (int64_t s = 0; s < arguments.sequences.count; ++s)
    arguments.correct(OneThread{}, sequence_ratio, kept, bounds[s], bounds[s + 1]);
}

LossSums sum(const LossArguments& arguments) {
  LossSums sums;
  const int32_t* bounds = arguments.sequences.bounds;
  if (arguments.batch.needs_sequence(arguments.config)) {
    for (int64_t s = 0; s < arguments.sequences.count; ++s)
      arguments.sequence(OneThread{}, sums, bounds[s], bounds[s + 1]);
  } else {
    for (int64_t t = 0; t < arguments.batch.tokens; ++t) arguments.token(sums, t);
  }
  return sums;
}

}  // namespace longgrpo
