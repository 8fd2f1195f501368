#include <algorithm>

#include "rows.cuh"

namespace longgrpo {
namespace {

int64_t segments(const RowTile& tile) { return (tile.transform.vocabulary + kSegment - 1) / kSegment; }

// Whole steps at the front of a row that fit into shared memory, which kBlocks blocks of a multiprocessor share.
template <int kStep, int kBlocks>
int64_t kept_columns(const RowTile& tile, const RowOutputs& out, const Chip& chip) {
  constexpr int64_t kReserved = 2 << 10;  // reductions, and the system's own
  if (!out.row_scale) return 0;
  const int64_t parts = segments(tile) * int64_t(sizeof(PartSums));
  const int64_t fit = (chip.shared_memory / kBlocks - kReserved - parts) / int64_t(sizeof(float)) / kStep * kStep;
  return std::clamp<int64_t>(round_up(tile.transform.vocabulary, kStep), 0, std::max<int64_t>(fit, 0));
}

template <class Out, bool kShaped, bool kBeyond, int kThreads>
void launch_row_kernel(const RowTile& tile, const RowOutputs& out, const Chip& chip, Stream stream) {
  const int64_t kept = kept_columns<Row<kShaped, kThreads>::kStep, kRowThreads / kThreads>(tile, out, chip);
  launch("row_kernel", row_kernel<Out, kShaped, kBeyond, kThreads>, tile.rows, kThreads,
         kept * int64_t(sizeof(float)) + segments(tile) * int64_t(sizeof(PartSums)), stream, tile, out, int(kept));
}

template <class Out, bool kShaped, bool kBeyond>
void with_threads(const RowTile& tile, const RowOutputs& out, const Chip& chip, Stream stream) {
  if (tile.transform.vocabulary <= kFewColumns)
    launch_row_kernel<Out, kShaped, kBeyond, kFewThreads>(tile, out, chip, stream);
  else
    launch_row_kernel<Out, kShaped, kBeyond, kManyThreads>(tile, out, chip, stream);
}

}  // namespace

void launch_rows(const RowTile& tile, const RowOutputs& out, Dtype dtype, const Chip& chip, Stream stream) {
  const bool shaped = tile.transform.bias || tile.transform.softcap > 0;
  const bool beyond = tile.reference_logits || tile.loss.beyond_logp();
  with_type(dtype, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    if (beyond) return with_threads<Out, true, true>(tile, out, chip, stream);
    if (shaped) return with_threads<Out, true, false>(tile, out, chip, stream);
    with_threads<Out, false, false>(tile, out, chip, stream);
  });
}

}  // namespace longgrpo
