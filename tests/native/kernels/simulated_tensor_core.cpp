// The tensor core of the simulator, its fragments as the PTX ISA lays them out, and the banks of shared memory.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "cuda/device.h"

namespace longgrpo::sim {

SharedAccesses shared_accesses{};

namespace {

// The argument of every lane, for what only whole warps do.
template <class T>
std::array<T*, kWarp> whole_warp(void* const* lanes, int count) {
  std::array<T*, kWarp> all;
  for (int i = 0; i < kWarp; ++i) {
    if (i >= count || !lanes[i]) throw std::runtime_error("an instruction of whole warps without all lanes");
    all[size_t(i)] = static_cast<T*>(lanes[i]);
  }
  return all;
}

}  // namespace

void count_banks(const uintptr_t* at, int n) {
  int asked[8] = {}, most = 0;  // of each place of 16 bytes in the 128 of all banks
  for (int i = 0; i < n; ++i)
    if (std::find(at, at + i, at[i]) == at + i)
      most = std::max(most, ++asked[at[i] / 16 % 8]);  // the same is read once
  ++shared_accesses.warps, shared_accesses.conflicts += uint64_t(most - 1);
}

void load_matrices(const void* from, uint32_t (&to)[4], int line) {
  struct Load {
    const char* from;
    uint32_t* to;
  } load{static_cast<const char*>(from), to};
  const auto act = [](void* const* lanes, int count) {
    const auto all = whole_warp<Load>(lanes, count);
    for (size_t matrix = 0; matrix < 4; ++matrix) {
      uintptr_t rows[8];
      for (size_t i = 0; i < 8; ++i) {
        rows[i] = reinterpret_cast<uintptr_t>(all[8 * matrix + i]->from);
        if (rows[i] % 16 != 0) throw std::runtime_error("a row of ldmatrix that is not on 16 bytes");
      }
      count_banks(rows, 8);
      for (size_t lane = 0; lane < kWarp; ++lane)
        std::memcpy(&all[lane]->to[matrix], all[8 * matrix + lane / 4]->from + lane % 4 * 4, 4);
    }
  };
  together(kFullMask, act, &load, line);
}

void multiply_add(const float (&a)[8], const float (&b)[4], float (&c)[4], int line) {
  struct Product {
    const float *a, *b;
    float* c;
  } product{a, b, c};
  const auto act = [](void* const* lanes, int count) {
    const auto all = whole_warp<Product>(lanes, count);
    double left[16][16], right[16][8], sums[16][8] = {};
    for (int lane = 0; lane < kWarp; ++lane) {
      const Product& of = *all[size_t(lane)];
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) left[group + r % 2 * 8][pair + r / 2 * 8 + half] = of.a[2 * r + half];
        for (int r = 0; r < 2; ++r) right[pair + r * 8 + half][group] = of.b[2 * r + half];
      }
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) sums[i][j] += left[i][k] * right[k][j];
    for (int lane = 0; lane < kWarp; ++lane)
      for (int r = 0; r < 4; ++r) {
        float& to = all[size_t(lane)]->c[r];
        to = float(double(to) + sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
      }
  };
  together(kFullMask, act, &product, line);
}

}  // namespace longgrpo::sim
