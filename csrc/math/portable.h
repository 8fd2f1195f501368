// Formulas in this folder compile for the host and for the device, in any translation unit.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define LONGGRPO_HD __host__ __device__ inline
#else
#define LONGGRPO_HD inline
#endif
