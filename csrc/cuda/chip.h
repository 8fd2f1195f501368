// What host code knows of the device, without CUDA's headers.
#pragma once

#include <cstdint>

namespace longgrpo {

using Stream = void*;  // a cudaStream_t

struct Chip {
  int multiprocessors;
  int64_t shared_memory;  // that one block can have, bytes
  int capability = 0;     // 80 for sm_80; 0: not asked for
};

// Makes the device current for the kernels, which have a CUDA runtime of their own beside torch's.
Chip use_device(int device);

}  // namespace longgrpo
