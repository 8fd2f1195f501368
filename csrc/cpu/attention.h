// Causal attention in which a query's bits depend on its own keys only: the reduction over them goes through blocks of
// kKeyBlock keys that begin at multiples of it, whatever queries, sequences or pages are computed beside it.
//
//   for each block   S = K Q^T scale;  m' = max(m, max S);  P = exp(S - m');  l = l exp(m - m') + sum P
//                    O = O exp(m - m') + V^T P
//   at the end       O / l                                        (Milakov and Gimelshein 2018; FlashAttention)
//
// The lanes are queries (lanes.h): the query heads that share a key head, token after token.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace longgrpo {

constexpr int64_t kPage = 32;        // keys that lie in one piece
constexpr int64_t kKeyBlock = 64;    // of a step of the softmax
constexpr int64_t kQueryTile = 128;  // lanes that read a block of keys and values together

// S sequences of packed queries. A sequence has queries [query_start[s], query_start[s + 1]) at its last positions, and
// keys at the positions [0, length[s]).
template <class T>
struct AttentionArguments {
  const T *query, *key, *value;
  T* out;  // [tokens, heads, head_size]
  int64_t sequences, heads, key_heads, head_size;
  int64_t query_token, query_head;      // strides
  int64_t key_row, key_head, key_page;  // of keys and of values: from a position to the next, ...
  const int32_t *query_start, *length;  // [S + 1], [S]
  const int32_t* pages;                 // [S, most_pages]: page j holds the positions [32 j, 32 j + 32)
  int64_t most_pages;
  const int32_t* first_row;  // [S], where there are no pages: the row of position 0
  float scale;
  int64_t window;  // a query sees the last `window` positions, its own among them; 0: all

  int64_t group() const { return heads / key_heads; }
  // Keys or values of 32 positions from `position`, a multiple of 32.
  const T* piece(const T* base, int64_t s, int64_t h, int64_t position) const {
    const int64_t at =
        pages ? pages[s * most_pages + position / kPage] * key_page : (first_row[s] + position) * key_row;
    return base + at + h * key_head;
  }
};

struct QueryTile {
  int64_t sequence, key_head, begin, count;  // lanes [begin, begin + count) of the sequence's queries x group
};

// m, l and what a block of scores does to them, for the 32 lanes of a panel.
struct Softmax {
  alignas(64) float largest[lanes::kLanes], sum[lanes::kLanes], factor[lanes::kLanes];
  alignas(64) int32_t begin[lanes::kLanes], end[lanes::kLanes];  // the keys that a lane sees

  // scores [keys][32] of the keys from `first` become exp(score - largest).
  void step(float* scores, int64_t keys, int64_t first, float scale);
};

// rows [n][32] *= factor [32]
void scale_lanes(float* rows, int64_t n, const float* factor);

// probabilities [keys][32] as the panel of the next product, whose keys are `padded` (a multiple of 32).
lanes::Bf16* as_panel(float* probabilities, int64_t keys, int64_t padded, lanes::Bf16* memory);
inline float* as_panel(float* probabilities, int64_t, int64_t, float*) { return probabilities; }

template <class T>
class AttentionTile {
  static constexpr bool kFloat = sizeof(T) == sizeof(float);
  static constexpr int64_t kPanels = kQueryTile / lanes::kLanes;

 public:
  explicit AttentionTile(const AttentionArguments<T>& in)
      : in_(in),
        queries_(size_t(in.head_size * kQueryTile)),
        outputs_(size_t(in.head_size * kQueryTile)),
        scores_(size_t(kKeyBlock * lanes::kLanes)),
        panel_(size_t(kKeyBlock * lanes::kLanes)),
        values_(size_t(kFloat ? 0 : in.head_size * kKeyBlock)) {}

  void run(const QueryTile& tile) {
    begin(tile);
    int64_t first = last_, end = 0;
    for (int64_t p = 0; p < panels_; ++p) {
      for (int64_t i = 0; i < lanes_of(p); ++i) {
        first = std::min<int64_t>(first, softmax_[p].begin[i]);
        end = std::max<int64_t>(end, softmax_[p].end[i]);
      }
    }
    for (int64_t block = first / kKeyBlock * kKeyBlock; block < end; block += kKeyBlock)
      step(block, std::min(kKeyBlock, end - block));
    finish();
  }

 private:
  int64_t lanes_of(int64_t panel) const { return std::min(lanes::kLanes, tile_.count - panel * lanes::kLanes); }
  // Of a lane: the query's token within the sequence, and its head.
  int64_t token(int64_t lane) const { return (tile_.begin + lane) / in_.group(); }
  int64_t head(int64_t lane) const { return tile_.key_head * in_.group() + (tile_.begin + lane) % in_.group(); }

  void begin(const QueryTile& tile) {
    tile_ = tile;
    panels_ = (tile.count + lanes::kLanes - 1) / lanes::kLanes;
    const int64_t s = tile.sequence, length = in_.length[s];
    const int64_t first_query = length - (in_.query_start[s + 1] - in_.query_start[s]);
    last_ = length;
    for (int64_t p = 0; p < panels_; ++p) {
      const T* rows[lanes::kLanes];
      Softmax& softmax = softmax_[p];
      std::fill_n(softmax.largest, lanes::kLanes, -INFINITY);
      std::fill_n(softmax.sum, lanes::kLanes, 0.0f);
      std::fill_n(softmax.begin, lanes::kLanes, 0), std::fill_n(softmax.end, lanes::kLanes, 0);
      for (int64_t i = 0; i < lanes_of(p); ++i) {
        const int64_t lane = p * lanes::kLanes + i, position = first_query + token(lane);
        rows[i] = in_.query + (in_.query_start[s] + token(lane)) * in_.query_token + head(lane) * in_.query_head;
        softmax.end[i] = int32_t(position + 1);
        softmax.begin[i] = in_.window > 0 ? int32_t(std::max<int64_t>(0, position + 1 - in_.window)) : 0;
      }
      lanes::pack(rows, lanes_of(p), in_.head_size, queries_.data() + p * in_.head_size * lanes::kLanes);
    }
    std::fill_n(outputs_.data(), panels_ * in_.head_size * lanes::kLanes, 0.0f);
  }

  void step(int64_t block, int64_t keys) {
    const int64_t s = tile_.sequence, h = tile_.key_head, d = in_.head_size;
    const int64_t padded = (keys + kPage - 1) / kPage * kPage;
    if constexpr (!kFloat) {
      for (int64_t j = 0; j < keys; j += kPage)
        lanes::transpose(in_.piece(in_.value, s, h, block + j), in_.key_row, std::min(kPage, keys - j), kPage, d,
                         values_.data() + j, kKeyBlock);
    }
    for (int64_t p = 0; p < panels_; ++p) {
      const T* queries = queries_.data() + p * d * lanes::kLanes;
      float* out = outputs_.data() + p * d * lanes::kLanes;
      for (int64_t j = 0; j < keys; j += kPage) {
        const T* key = in_.piece(in_.key, s, h, block + j);
        float* scores = scores_.data() + j * lanes::kLanes;
        const int64_t rows = std::min(kPage, keys - j);
        if constexpr (kFloat)
          lanes::product(key, in_.key_row, 1, rows, d, queries, lanes_of(p), scores, false);
        else
          lanes::product(key, in_.key_row, rows, d, queries, lanes_of(p), scores, false);
      }
      softmax_[p].step(scores_.data(), keys, block, in_.scale);
      scale_lanes(out, d, softmax_[p].factor);
      const T* panel = as_panel(scores_.data(), keys, padded, panel_.data());
      if constexpr (kFloat) {
        for (int64_t j = 0; j < keys; j += kPage)
          lanes::product(in_.piece(in_.value, s, h, block + j), 1, in_.key_row, d, std::min(kPage, keys - j),
                         panel + j * lanes::kLanes, lanes_of(p), out, true);
      } else {
        lanes::product(values_.data(), kKeyBlock, d, padded, panel, lanes_of(p), out, true);
      }
    }
  }

  void finish() {
    for (int64_t p = 0; p < panels_; ++p) {
      float* out = outputs_.data() + p * in_.head_size * lanes::kLanes;
      for (float& factor : softmax_[p].factor) factor = 0;
      for (int64_t i = 0; i < lanes_of(p); ++i) softmax_[p].factor[i] = 1.0f / softmax_[p].sum[i];
      scale_lanes(out, in_.head_size, softmax_[p].factor);
      for (int64_t i = 0; i < lanes_of(p); ++i) {
        const int64_t lane = p * lanes::kLanes + i;
        rows_[i] = in_.out + ((in_.query_start[tile_.sequence] + token(lane)) * in_.heads + head(lane)) * in_.head_size;
      }
      lanes::store(out, in_.head_size, lanes_of(p), rows_);
    }
  }

  const AttentionArguments<T>& in_;
  QueryTile tile_{};
  int64_t panels_ = 0, last_ = 0;
  Softmax softmax_[kPanels];
  std::vector<T> queries_;      // panels of [head_size, 32]
  std::vector<float> outputs_;  // the same
  std::vector<float> scores_;   // [keys][32] of one panel
  std::vector<T> panel_;        // its probabilities
  std::vector<T> values_;       // [head_size][keys], bf16 only
  T* rows_[lanes::kLanes];
};

template <class T, class Runtime>
void run_attention(const Runtime& runtime, const AttentionArguments<T>& in) {
  std::vector<QueryTile> tiles;
  for (int64_t s = 0; s < in.sequences; ++s) {
    const int64_t lanes = (in.query_start[s + 1] - in.query_start[s]) * in.group();
    for (int64_t h = 0; h < in.key_heads; ++h)
      for (int64_t begin = 0; begin < lanes; begin += kQueryTile)
        tiles.push_back({s, h, begin, std::min(kQueryTile, lanes - begin)});
  }
  const int64_t count = int64_t(tiles.size()), threads = std::min(runtime.threads(), count);
  runtime.parallel_for(threads, [&](int64_t thread) {
    const lanes::TileState state;
    AttentionTile<T> tile(in);
    for (int64_t i = thread; i < count; i += threads) tile.run(tiles[size_t(i)]);  // the last of a sequence cost most
  });
}

}  // namespace longgrpo
