// Products over 32 lanes, C [rows, 32] (+)= A [rows, k] B [k, 32], whose every number is summed in the order of k: its
// bits depend on its row of A and its lane of B, and on nothing that is computed beside it. The lanes are the rows of
// the activations (tokens of a linear, queries of an attention), so that a token has the same bits alone, in a batch
// and at any place of it. A is read where it lies: weights, keys.
//
// bf16 operands, fp32 sums: by AMX tiles where the processor has them and k is whole tiles, else by AVX512-BF16.
#pragma once

#include <cstdint>

#include "amx.h"

namespace longgrpo::lanes {

constexpr int64_t kLanes = 32;

using Bf16 = uint16_t;

// Whether bf16 products can be computed here.
bool supported();

using amx::TileState;  // to be held by a thread around its products of bf16

// B from its lanes: rows of k elements each, of which there are `count`; the other lanes are 0.
//   bf16: [k / 2][32] pairs of neighbouring k, k even      float: [k][32]
void pack(const Bf16* const* rows, int64_t count, int64_t k, Bf16* panel);
void pack(const float* const* rows, int64_t count, int64_t k, float* panel);

// `lanes`: how many are wanted; of the others C may hold anything. c [rows][32]. Element (i, k) of A lies at
// a[i * row_stride + k * k_stride]; a k_stride other than 1 is for float only.
void product(const Bf16* a, int64_t row_stride, int64_t rows, int64_t k, const Bf16* panel, int64_t lanes, float* c,
             bool add);
void product(const float* a, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, const float* panel,
             int64_t lanes, float* c, bool add);

// [keys][d] -> [d][keys], `keys` a multiple of 32 of which the first `count` are read; the others are 0.
void transpose(const Bf16* values, int64_t stride, int64_t count, int64_t keys, int64_t d, Bf16* out,
               int64_t out_stride);

// c [rows][32] -> y[lane][rows] of each lane, plus bias [rows] if it is there.
void store(const float* c, int64_t rows, int64_t lanes, Bf16* const* y, const Bf16* bias = nullptr);
void store(const float* c, int64_t rows, int64_t lanes, float* const* y, const float* bias = nullptr);

}  // namespace longgrpo::lanes
