// Formulas in this folder compile for the host and for the device, in any translation unit.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define LONGGRPO_HD __host__ __device__ inline
#define LONGGRPO_COLUMN __host__ __device__ __forceinline__  // called for every column of a row
#define LONGGRPO_TEAM __device__ inline                      // run by all threads of a team together
#else
#define LONGGRPO_HD inline
#define LONGGRPO_COLUMN inline __attribute__((always_inline))  // so that vector loops stay vector loops
#define LONGGRPO_TEAM inline
#endif
