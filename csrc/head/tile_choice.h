// What a measurement has chosen for a head, in place of a device's own rule.
#pragma once

#include <array>
#include <compare>
#include <stdexcept>
#include <string>
#include <vector>

#include "head_pass.h"
#include "types.h"

namespace longgrpo {

struct HeadKey {
  int64_t hidden, vocabulary;
  Dtype hidden_dtype, weight_dtype;
  auto operator<=>(const HeadKey&) const = default;
};

struct TileChoice {
  struct Tile {
    int64_t rows = 0, columns = 0;  // 0: the device's rule; whole rows have no columns
  };
  std::array<Tile, 3> tiles{};  // for each Tiling of cuda/plan.h; the CPU has whole rows only
  int64_t passes = 0;           // of a trained head: 1, 2, or 0 for the rule
  bool score = false;           // scoring that stands alone is the kernel's of cuda/score.h

  // (rows, columns) of each tiling, then passes and score; nothing: the rule for all.
  static TileChoice unpack(const std::vector<int64_t>& numbers) {
    TileChoice choice;
    if (numbers.empty()) return choice;
    constexpr size_t kTiles = 2 * std::tuple_size_v<decltype(tiles)>;
    if (numbers.size() != kTiles + 2)
      throw std::invalid_argument("a choice of tiles has " + std::to_string(kTiles + 2) + " numbers, got " +
                                  std::to_string(numbers.size()));
    for (size_t i = 0; i < choice.tiles.size(); ++i) {
      choice.tiles[i] = {numbers[2 * i], numbers[2 * i + 1]};
      if (choice.tiles[i].rows != 0 && (choice.tiles[i].rows < kMinTileRows || choice.tiles[i].columns < 0))
        throw std::invalid_argument("a tile has at least " + std::to_string(kMinTileRows) + " rows, got " +
                                    std::to_string(choice.tiles[i].rows));
    }
    choice.passes = numbers[kTiles];
    choice.score = numbers[kTiles + 1] != 0;
    if (choice.passes < 0 || choice.passes > 2)
      throw std::invalid_argument("a trained head takes 1 or 2 passes, got " + std::to_string(choice.passes));
    return choice;
  }
};

}  // namespace longgrpo
