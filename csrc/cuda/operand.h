// A matrix in memory, as a GEMM reads it.
#pragma once

#include <cstdint>

#include "../head/types.h"

namespace longgrpo {

struct Operand {
  const void* data;
  Dtype dtype;
  int64_t rows, columns, row_stride, column_stride;

  Operand transposed() const { return {data, dtype, columns, rows, column_stride, row_stride}; }
};

inline const void* at(const void* data, Dtype dtype, int64_t i) {
  return static_cast<const char*>(data) + i * size_of(dtype);
}
inline void* at(void* data, Dtype dtype, int64_t i) { return static_cast<char*>(data) + i * size_of(dtype); }

}  // namespace longgrpo
