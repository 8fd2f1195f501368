#include "head_bytes.h"

#include "head.h"

namespace longgrpo {

int64_t head_bytes(const HeadShape& shape, Dtype hidden_dtype, Dtype weight_dtype, bool hidden_gradient,
                   bool weight_gradient, bool reference, int64_t threads, int64_t limit) {
  HeadInputs in{};
  in.hidden_dtype = hidden_dtype, in.weight_dtype = weight_dtype;
  HeadPlan plan{shape.tokens,    shape.tokens,    0,        staging_bytes(shape, in, weight_gradient, threads),
                hidden_gradient, weight_gradient, reference};
  plan = plan_tiles(plan, shape, limit);
  return workspace_bytes(plan, shape, plan.tile_rows);
}

}  // namespace longgrpo
