// y = act(gate) up, number by number: its bits do not depend on where in a tensor it stands.
#pragma once

#include <cstdint>

#include "../head/types.h"

namespace longgrpo {

enum class Activation : int64_t { silu, gelu_tanh };

// n numbers; gate, up and y of `dtype`.
void gated(Activation activation, Dtype dtype, const void* gate, const void* up, void* y, int64_t n);
// The gradients of gate and up from dy.
void gated_backward(Activation activation, Dtype dtype, const void* gate, const void* up, const void* dy, void* dgate,
                    void* dup, int64_t n);

}  // namespace longgrpo
