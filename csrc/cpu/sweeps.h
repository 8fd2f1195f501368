// The sweeps over a loss's tokens on the CPU, which looks at values: only rows that it has to visit are in the pass.
#pragma once

#include <vector>

#include "../head/row_loss.h"
#include "../head/sweeps.h"

namespace longgrpo {

// Tokens in the order of a pass: first those that can have a gradient, then those that only report.
struct CpuRows {
  std::vector<int64_t> order;
  int64_t active;
};

// weight [tokens] receives visits.weight of every token.
CpuRows visit(const Visits& visits, float* weight);

// Every token that has a target and that `loss` does not skip.
CpuRows rows_of(const RowLoss& loss, const int64_t* target, int64_t tokens);

void correct(const LossArguments& arguments, float* sequence_ratio, float* kept);

LossSums sum(const LossArguments& arguments);

}  // namespace longgrpo
