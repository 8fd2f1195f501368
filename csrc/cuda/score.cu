// Scoring without logits in memory: hidden W^T on the tensor cores, tile by tile, and the softmax of what the tile
// holds while it is in registers.
//
//   a block    128 rows x a part of the vocabulary, 128 columns at a time; four warps of 64 x 64
//   a step     32 numbers of depth: cp.async fills the stage two steps ahead, ldmatrix and mma.m16n8k16 use this one
//   a tile     after its last step the 128 products of a thread, 8 rows x 16 columns, join 8 running softmaxes
//   a segment  after 512 columns the four lanes of a row merge theirs, and every warp writes its part
//   at the end merge_kernel, a warp a row: all parts of a row in one order, then logp and entropy
//
// The segments do not depend on how the vocabulary is split over blocks, so the bits do not either. They are other bits
// than those of rows.cuh and flash.cuh: this logp must not enter a ratio beside theirs.
//
// Shared memory: 3 stages of 16 KiB, so that with at most 255 registers a thread two blocks fit a multiprocessor, from
// sm_80 to sm_120. A stage's row is four chunks of 16 bytes; chunk c of row r lies at c ^ (r / 2 % 4): the eight rows
// of a matrix, and the eight chunks that eight lanes copy, are in different banks.
//
// A warp's step: 64 mma, 16 ldmatrix (64 bytes of shared memory for 1024 multiply-adds), 8 cp.async. A logit beside its
// product: one exponential and, in sm_90a's machine code, 19 instructions. Bytes of a launch: W once, hidden once
// as long as its rows (at most 2048, see score.h) stay in L2, and 24 bytes a row and segment, written and read.
#include <algorithm>

#include "launch.h"
#include "rows.cuh"
#include "tensor_core.cuh"

namespace longgrpo {
namespace score {

constexpr int kGroup = 8;  // columns of a thread that share a look at the maximum
constexpr int kTileRows = kScoreTileRows, kTileColumns = 128, kDepth = 32, kStages = 3;
constexpr int kWarpRows = 64, kWarpColumns = 64, kThreads = 128, kMergeThreads = 256;
constexpr int kWarpsAcross = kTileColumns / kWarpColumns;
constexpr int kRowFragments = kWarpRows / 16,
              kColumnFragments = kWarpColumns / 8;    // of a warp's tile: 16 rows, 8 columns
constexpr int kChunk = 8, kChunks = kDepth / kChunk;  // numbers of 16 bytes; of a stage's row
constexpr int kMatrix = kTileRows * kDepth;           // numbers of one operand's stage
constexpr int64_t kSharedBytes = 2 * int64_t(kStages) * 2 * kMatrix;
static_assert(kTileRows == kTileColumns && kTileRows / kWarpRows * kWarpsAcross * kWarp == kThreads);
static_assert(kScoreSegment % kTileColumns == 0 && kScoreParts == kWarpsAcross && 2 * kColumnFragments % kGroup == 0);

// Where a chunk of a stage's row lies, in numbers. Rows 8 apart have the same order of chunks.
DEVICE int place(int row, int chunk) { return row * kDepth + (chunk ^ (row / 2 % kChunks)) * kChunk; }

// Eight numbers [at, at + 8) of a row, zeros past its end or where there is no row. kWide: all chunks lie on 16 bytes
// and end within the row.
template <bool kWide, class T>
DEVICE void fetch_chunk(T* to, const T* row, bool there, int at, int end) {
  if constexpr (kWide) {
    const bool inside = there && at < end;
    copy_async(to, row + at, inside ? 16 : 0);
  } else {
    uint32_t bits[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) bits[k] = there && at + k < end ? row[at + k].bits : 0u;
    store_shared(to,
                 {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16});
  }
}

// This thread's share of one operand's stage: rows [first, first + 128) of [rows, hidden], from column `at`.
template <bool kWide, class T>
DEVICE void fetch(T* stage, const T* matrix, int64_t first, int64_t rows, int at, int hidden) {
  const int row = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
  constexpr int kRowsAtOnce = kThreads / kChunks;  // a multiple of 8: the order of chunks stays
  const int64_t stride = int64_t(kRowsAtOnce) * hidden;
  const T* from = matrix + (first + row) * hidden;
#pragma unroll(kWide ? kTileRows / kRowsAtOnce : 1)
  for (int i = 0; i < kTileRows; i += kRowsAtOnce, from += stride)
    fetch_chunk<kWide>(stage + place(row, chunk) + i * kDepth, from, first + row + i < rows, at + chunk * kChunk,
                       hidden);
}

// A step of the block: a tile of columns, and a depth in it.
struct Step {
  int column, depth;

  DEVICE void next(int hidden) {
    depth += kDepth;
    if (depth < hidden) return;
    depth = 0, column += kTileColumns;
  }
};

using Sums = float[kRowFragments][kColumnFragments][4];

// sums += this warp's part of hidden W^T over the depth of one stage.
template <class T>
DEVICE void multiply(const T* hidden, const T* weight, Sums& sums) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int row = warp / kWarpsAcross * kWarpRows + lane % 16;
  const int column = warp % kWarpsAcross * kWarpColumns + lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kChunks; k += 2) {  // the two chunks of one mma
    uint32_t a[4], b[kColumnFragments / 2][4];
#pragma unroll
    for (int j = 0; j < kColumnFragments / 2; ++j)
      load_matrices(weight + place(column, k + lane / 8 % 2) + j * 16 * kDepth, b[j]);
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      load_matrices(hidden + place(row, k + lane / 16) + i * 16 * kDepth, a);
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j) multiply_add(a, &b[j / 2][j % 2 * 2], sums[i][j], T{});
    }
  }
}

// The sums of columns as they come.
struct OnlineSoftmax {
  PartSums part;
  float factor2;

  DEVICE void add(const float* x) {  // kGroup numbers
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kGroup; ++i) top = fmaxf(top, x[i]);
    part.raise(top, factor2);
    const float from = part.origin();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float t = exponent(x[i], from, factor2), e = exp2_fast(t);
      part.sum += e;
      part.weighted = fmaf(e, fmaxf(t, kLowestExponent), part.weighted);
    }
  }

  DEVICE void merge(OnlineSoftmax other) {
    part.raise(other.part.highest, factor2);
    other.part.raise(part.highest, factor2);
    part.sum += other.part.sum;
    part.weighted += other.part.weighted;
  }
};

template <class T, bool kShaped, bool kWide>
struct ScoreBlock {
  static constexpr int kOwnRows = 2 * kRowFragments;  // of a thread: row(r), r < kOwnRows
  static constexpr PartSums kNothing{-INFINITY, 0, 0};

  const ScoreTile& in;
  const int vocabulary, first_row;
  int own_row;              // the first of this thread's
  PartSums part[kOwnRows];  // of this thread's columns of the segment so far

  DEVICE ScoreBlock(const ScoreTile& in, int first_row)
      : in(in), vocabulary(int(in.tile.transform.vocabulary)), first_row(first_row) {
    own_row = first_row + warp() / kWarpsAcross * kWarpRows + lane() / 4;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) part[r] = kNothing;
  }

  DEVICE static int lane() { return int(threadIdx.x) % kWarp; }
  DEVICE static int warp() { return int(threadIdx.x) / kWarp; }
  DEVICE int row(int r) const { return own_row + r * 8; }
  DEVICE bool there(int r) const { return row(r) < in.tile.rows; }
  DEVICE int64_t token(int r) const { return in.tile.first + row(r); }
  DEVICE Logits<kShaped> logits(int r) const {
    return {in.tile.transform, there(r) ? in.tile.temperature_of(token(r)) : 1.0f, 0, vocabulary};
  }

  // The columns [column, column + 128) join the softmaxes; the target's stays out of them.
  DEVICE void add(const Sums& sums, int column) {
    const int own = column + warp() % kWarpsAcross * kWarpColumns + lane() % 4 * 2;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const Logits<kShaped> transform = logits(r);
      const int target = there(r) && in.tile.target[token(r)] < vocabulary ? int(in.tile.target[token(r)]) : -1;
      OnlineSoftmax softmax{part[r], transform.factor2()};
      bool met = false;
      float target_x = 0;
#pragma unroll
      for (int group = 0; group < kColumnFragments; group += kGroup / 2) {
        float x[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          const int j = group + k / 2, at = own + j * 8 + k % 2;
          x[k] = transform(sums[r / 2][j][r % 2 * 2 + k % 2], at);
          if (at == target) met = true, target_x = x[k];
          if (at == target || at >= vocabulary) x[k] = -INFINITY;
        }
        softmax.add(x);
      }
      if (met) in.target_x[row(r)] = target_x;
      part[r] = softmax.part;
    }
  }

  // What the segment's columns gave, this warp's part.
  DEVICE void write(int segment) {
    const int64_t to = segment * kScoreParts + warp() % kWarpsAcross;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const OnlineSoftmax whole = warp_reduce<4>(OnlineSoftmax{part[r], logits(r).factor2()});
      if (lane() % 4 == 0 && there(r)) in.parts[row(r) * score_parts(vocabulary) + to] = whole.part;
      part[r] = kNothing;
    }
  }

  DEVICE void run(T* stages, const T* hidden, const T* weight, Step step, int end) {
    const int size = int(in.hidden_size);
    Step ahead = step;
    const auto fetch_ahead = [&](int stage) {
      if (ahead.column < end) {
        T* const to = stages + stage * 2 * kMatrix;
        fetch<kWide>(to, hidden, first_row, in.tile.rows, ahead.depth, size);
        fetch<kWide>(to + kMatrix, weight, ahead.column, vocabulary, ahead.depth, size);
        ahead.next(size);
      }
      commit_copies();  // a group a step, empty at the end
    };
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch_ahead(stage);

    Sums sums = {};
    for (int stage = 0; step.column < end;) {
      wait_copies<kStages - 2>();
      __syncthreads();  // everybody's copies have landed, and everybody is done with the stage before
      fetch_ahead(stage == 0 ? kStages - 1 : stage - 1);
      const T* const now = stages + stage * 2 * kMatrix;
      multiply(now, now + kMatrix, sums);
      const int column = step.column;
      step.next(size);
      stage = stage == kStages - 1 ? 0 : stage + 1;
      if (step.column == column) continue;
      forget(own_row);
      add(sums, column);
      memset(sums, 0, sizeof sums);
      if (step.column % kScoreSegment == 0 || step.column >= end) write(column / kScoreSegment);
    }
  }
};

template <class T, bool kShaped, bool kWide>
KERNEL(kThreads, 2)
score_kernel(ScoreTile in, int row_tiles, int split_columns) {
  if constexpr (kTensorCores) {
    DYNAMIC_SHARED(T, stages);
    const int row_tile = int(blockIdx.x) % row_tiles, begin = int(blockIdx.x) / row_tiles * split_columns;
    const int vocabulary = int(in.tile.transform.vocabulary);
    const int end = vocabulary - begin < split_columns ? vocabulary : begin + split_columns;
    ScoreBlock<T, kShaped, kWide>(in, row_tile * kTileRows)
        .run(stages, static_cast<const T*>(in.hidden) + in.tile.first * in.hidden_size,
             static_cast<const T*>(in.weight), {begin, 0}, end);
  }
}

template <bool kShaped>
KERNEL(kMergeThreads)
merge_kernel(ScoreTile in, RowOutputs out) {
  const int64_t row = int64_t(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t token = in.tile.first + row, vocabulary = in.tile.transform.vocabulary;
  if (row >= in.tile.rows || in.tile.skips(token)) return;  // a whole warp
  const float factor2 = Logits<kShaped>(in.tile.transform, in.tile.temperature_of(token), 0, int(vocabulary)).factor2();
  const int64_t parts = score_parts(vocabulary);
  const PartSums whole = fold(in.parts + row * parts, int(parts), factor2);
  if (threadIdx.x % kWarp != 0) return;
  const bool inside = in.tile.target[token] < vocabulary;  // if not: NaN, no way to raise an error from here
  const RowSoftmax softmax = finish(whole, factor2, inside ? in.target_x[row] : NAN).softmax;
  if (out.logp) out.logp[token] = inside ? softmax.logp : NAN;
  if (out.entropy) out.entropy[token] = softmax.entropy;
}

}  // namespace score

void launch_score(const ScoreTile& in, Dtype dtype, int64_t splits, const RowOutputs& out, Stream stream) {
  using namespace score;
  const RowTile& tile = in.tile;
  const int64_t vocabulary = tile.transform.vocabulary, segments = round_up(vocabulary, kScoreSegment) / kScoreSegment;
  const int64_t of_a_split = (segments + splits - 1) / splits;
  const int64_t row_tiles = (tile.rows + kTileRows - 1) / kTileRows, used = (segments + of_a_split - 1) / of_a_split;
  const bool shaped = tile.transform.bias || tile.transform.softcap > 0;
  const auto go = [&](auto score, auto merge) {
    launch("score_kernel", score, row_tiles * used, kThreads, kSharedBytes, stream, in, int(row_tiles),
           int(of_a_split * kScoreSegment));
    launch("merge_kernel", merge, (tile.rows + kMergeThreads / kWarp - 1) / (kMergeThreads / kWarp), kMergeThreads, 0,
           stream, in, out);
  };
  const auto with = [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto on_16_bytes = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    const bool wide = in.hidden_size % kChunk == 0 && on_16_bytes(in.hidden) && on_16_bytes(in.weight);
    if (wide && shaped) return go(score_kernel<T, true, true>, merge_kernel<true>);
    if (wide) return go(score_kernel<T, false, true>, merge_kernel<false>);
    if (shaped) return go(score_kernel<T, true, false>, merge_kernel<true>);
    go(score_kernel<T, false, false>, merge_kernel<false>);
  };
  dtype == Dtype::bf16 ? with(Tag<Bf16>{}) : with(Tag<Half>{});
}

}  // namespace longgrpo
