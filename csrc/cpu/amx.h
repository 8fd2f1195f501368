// Products of bf16 by AMX tiles.
#pragma once

#include <cstdint>

#include "avx512.h"
#include "simd.h"

namespace longgrpo::amx {

// Whether the processor has AMX's tiles of bf16 and the system lends them.
bool available();

// To be held by a thread around its products by tiles; empty if there is no AMX.
class TileState {
 public:
  TileState();
  ~TileState();
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;
};

}  // namespace longgrpo::amx

#if defined(LONGGRPO_AVX512_BF16) && defined(__linux__)
#define LONGGRPO_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

namespace longgrpo::amx {

constexpr int64_t kTile = 16;     // rows of a tile
constexpr int64_t kDepth = 32;    // bf16 in a row of a tile
constexpr int64_t kColumns = 32;  // of C, in two tiles

// GCC 12's intrinsics do not tell the compiler that they read memory: what is stored before them is to be there.
LONGGRPO_INLINE void written() { asm volatile("" ::: "memory"); }

// C [16 Tiles, 32] (+)= A B, of whose columns the first 16 Halves are computed. A: rows `stride` apart. B: pairs of
// neighbouring k, [k / 2][32]. k: whole tiles. A number is summed in the order of k.
template <int Tiles, int Halves>
LONGGRPO_AMX __attribute__((noinline)) void product(const uint16_t* a, int64_t stride, int64_t k, const uint32_t* b,
                                                    float* c, bool add) {
  constexpr int64_t line = kColumns * 4;  // bytes of a row of C and of a row of B
  written();
  if (add) {
    _tile_loadd(0, c, line);
    if constexpr (Halves == 2) _tile_loadd(1, c + 16, line);
    if constexpr (Tiles == 2) _tile_loadd(2, c + kTile * kColumns, line);
    if constexpr (Tiles == 2 && Halves == 2) _tile_loadd(3, c + kTile * kColumns + 16, line);
  } else {
    _tile_zero(0);
    if constexpr (Halves == 2) _tile_zero(1);
    if constexpr (Tiles == 2) _tile_zero(2);
    if constexpr (Tiles == 2 && Halves == 2) _tile_zero(3);
  }
  for (int64_t p = 0; p < k; p += kDepth) {
    const uint32_t* pairs = b + p / 2 * kColumns;
    _tile_loadd(6, pairs, line);
    _tile_loadd(4, a + p, stride * int64_t(sizeof(uint16_t)));
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Halves == 2) {
      _tile_loadd(7, pairs + 16, line);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Tiles == 2) {
      _tile_loadd(5, a + kTile * stride + p, stride * int64_t(sizeof(uint16_t)));
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Halves == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, line);
  if constexpr (Halves == 2) _tile_stored(1, c + 16, line);
  if constexpr (Tiles == 2) _tile_stored(2, c + kTile * kColumns, line);
  if constexpr (Tiles == 2 && Halves == 2) _tile_stored(3, c + kTile * kColumns + 16, line);
}

}  // namespace longgrpo::amx

#endif
