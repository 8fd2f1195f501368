// One stream each way beside the compute stream, pooled events, pinned host memory.
#pragma once

#include <functional>

#include "backend.h"

namespace longgrpo::offload {

// `compute` names the caller's current stream on this device; torch's comes from csrc/ops.
std::unique_ptr<Backend> make_cuda_backend(int device, std::function<Stream()> compute);

}  // namespace longgrpo::offload
