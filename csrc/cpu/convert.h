// fp32 <-> bf16 / fp16 rows. Rounding is to nearest even, as torch's.
#pragma once

#include <cstdint>

#include "../head/types.h"

namespace longgrpo {

void to_float(const void* source, Dtype dtype, float* destination, int64_t n);
void from_float(const float* source, float factor, void* destination, Dtype dtype, int64_t n);

}  // namespace longgrpo
