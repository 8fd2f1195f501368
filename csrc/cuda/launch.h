// The kernels as host functions: launch configurations are here, kernels in the .cuh files. No torch, no CUDA headers.
//
// Logits of a tile are fp32 [rows, stride]; stride is a multiple of kStrideUnit, so that every row starts on 16 bytes
// and the columns past the vocabulary may be read (whatever they hold) and written. A signed row in a half type lies in
// the second half of its row of logits: a sweep from the last column to the first writes only what it has read.
#pragma once

#include "../head/row_loss.h"
#include "../head/sweeps.h"
#include "../head/types.h"
#include "chip.h"

namespace longgrpo {

constexpr int64_t kStrideUnit = 8;

// Threads of a block for rows of few or of many columns, and how many of a multiprocessor's threads the blocks share:
// a barrier of one block is hidden by another.
constexpr int kFewThreads = 256, kManyThreads = 512, kRowThreads = 1024;
constexpr int64_t kFewColumns = 8192;
// Columns that one warp sums (see softmax.cuh). Chunks of a row are multiples of it.
constexpr int kSegment = 512;
struct PartSums;
constexpr int64_t kPartBytes = 12;

// A tile of rows as the kernels see it. Row i is the token first + i.
struct RowTile {
  int64_t first, rows, stride;
  float* logits;
  const float* reference_logits;  // the same shape, or null
  LogitTransform transform;
  const float* token_temperature;
  float temperature;
  const int64_t* target;
  ExactKl exact_kl;
  RowLoss loss;

  LONGGRPO_HD float temperature_of(int64_t token) const {
    return token_temperature ? token_temperature[token] : temperature;
  }
  LONGGRPO_HD bool skips(int64_t token) const { return target[token] < 0 || loss.skips(token); }
};

struct RowOutputs {                     // null if not wanted
  float* logp;                          // [tokens]
  float* entropy;                       // [tokens]
  float* kl;                            // [tokens]
  float* scale;                         // [tokens]
  float* row_scale;                     // [rows]: the same for the tile. Null: statistics only, the logits stay
  RowNormalizer* normalizer = nullptr;  // [tokens], of rows in chunks
};

// Statistics of whole rows, and the signed row in `dtype` in place:
//   row_scale_i signed_ij = dL/d(logit_ij before the transform)
void launch_rows(const RowTile& tile, const RowOutputs& out, Dtype dtype, const Chip& chip, Stream stream);

// ---- rows in chunks of the vocabulary (see flash.cuh) ----

struct ChunkState {
  float reference;  // E_j = 2^(factor2 (x_j - reference)) in `sums`; if there is a gradient
  float target_x;   // the target's transformed logit, once its chunk has been there
};

struct Chunks {
  ChunkState* state;  // [rows]
  PartSums* parts;    // [rows, segments]: every column but the target's
  int64_t segments;   // of a whole row
  float* sums;        // [rows, hidden], or null without a gradient: sum_j E_j w_j over the chunks so far
  int64_t hidden;
  int64_t before = 0;  // segments of the chunks before this one
};

// Adds the columns [column, column + columns) to `chunks`; tile.logits holds only these columns. With a gradient the
// logits become E_j (1 - tanh_j^2) in `dtype`, 0 at the target.
void launch_chunk(const RowTile& tile, int64_t column, int64_t columns, const Chunks& chunks, Dtype dtype,
                  Stream stream);

struct Direction {
  const void* weight;
  Dtype weight_dtype;
  void* to;  // [tokens, hidden]
  Dtype dtype;
};

// logp, entropy, normalizer, scale and, if `chunks` has sums, direction of rows whose chunks are all there.
void launch_finish(const RowTile& tile, const RowOutputs& out, const Chunks& chunks, const Direction& direction,
                   Stream stream);

// A pass for only the weight's gradient: the logits of the columns [column, column + columns) become
// dL/d(logit before the transform), with c [tokens] = dL/d(logp), in `dtype`.
void launch_weight_rows(const RowTile& tile, int64_t column, int64_t columns, const float* c, const float* logp,
                        const RowNormalizer* normalizer, Dtype dtype, Stream stream);

// ---- scoring on the tensor cores (see score.cu) ----

constexpr int kScoreTileRows = 128;
constexpr int64_t kScoreSegment = 512;  // columns that are summed by themselves, however the vocabulary is split
constexpr int64_t kScoreParts = 2;      // of a segment's columns, a warp each

LONGGRPO_HD int64_t score_parts(int64_t vocabulary) {
  return (vocabulary + kScoreSegment - 1) / kScoreSegment * kScoreParts;
}

struct ScoreTile {
  RowTile tile;  // its logits are null
  const void* hidden;
  const void* weight;  // both in the dtype of the launch, [tokens, hidden_size] and [vocabulary, hidden_size]
  int64_t hidden_size;
  PartSums* parts;  // scratch [rows, score_parts(vocabulary)], the target's column left out
  float* target_x;  // scratch [rows]: the target's transformed logit
};

// logp and entropy of whole rows of bf16 or fp16 operands; blocks share the vocabulary in at most `splits` ranges of
// segments, and any number of them gives the same bits. Needs sm_80.
void launch_score(const ScoreTile& in, Dtype dtype, int64_t splits, const RowOutputs& out, Stream stream);

// ---- matrices ----

// to[i, j] = scale_i from[i, j], 0 if scale_i is 0, and from[i, j] itself if `scale` is null. In place is fine.
void launch_scale_rows(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, const float* scale, int64_t rows,
                       int64_t columns, Stream stream);
// to += *factor from, n numbers; factor null: 1
void launch_add(float* to, const float* from, const float* factor, int64_t n, Stream stream);
// to = *factor from, n numbers; factor null: 1
void launch_scale(const float* from, void* to, Dtype dtype, const float* factor, int64_t n, Stream stream);
// to[j] += *factor sum_i scale_i from[i, j]; from has `stride` numbers a row. scale or factor null: 1
void launch_add_columns(float* to, const void* from, Dtype dtype, const float* scale, const float* factor, int64_t rows,
                        int64_t columns, int64_t stride, Stream stream);
// to = from / max |from|, which goes to *highest; all 0 stays 0
void launch_normalize(const float* from, float* to, float* highest, int64_t n, Stream stream);

// ---- the loss from logp ----

// weight [tokens] receives visits.weight of every token.
void launch_visited(const Visits& visits, float* weight, Stream stream);

// The arrays [tokens] that LossArguments::correct makes; either may be null.
void launch_correct(const LossArguments& arguments, float* sequence_ratio, float* kept, Stream stream);

// Partial sums that launch_token_loss needs.
int64_t loss_partials(const LossArguments& arguments);
// The loss, its metrics and c; partials [loss_partials] is scratch.
void launch_token_loss(const LossArguments& arguments, LossSums* partials, const LossOutputs& out, Stream stream);

}  // namespace longgrpo
