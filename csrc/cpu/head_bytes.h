#pragma once

#include "../head/head_pass.h"
#include "../head/types.h"

namespace longgrpo {

// The workspace of one head pass over all of `shape.tokens` on a CPU's threads, in bytes, within `limit`.
int64_t head_bytes(const HeadShape& shape, Dtype hidden_dtype, Dtype weight_dtype, bool hidden_gradient,
                   bool weight_gradient, bool reference, int64_t threads, int64_t limit);

}  // namespace longgrpo
