#include <algorithm>

#include "rows.cuh"

namespace longgrpo {
namespace {

// Whole chunks at the front of a row that fit into shared memory.
template <int kStep>
int64_t kept_columns(const RowTile& tile, const RowOutputs& out, const Chip& chip) {
  constexpr int64_t kReserved = 2 << 10, kChunk = kStep;  // reductions, and the system's own
  if (!out.row_scale) return 0;
  const int64_t fit = (chip.shared_memory - kReserved) / int64_t(sizeof(float)) / kChunk * kChunk;
  return std::clamp<int64_t>(round_up(tile.transform.vocabulary, kChunk), 0, std::max<int64_t>(fit, 0));
}

template <class Out, bool kShaped, bool kBeyond, int kThreads>
void launch_row_kernel(const RowTile& tile, const RowOutputs& out, const Chip& chip, Stream stream) {
  const int64_t kept = kept_columns<Row<kShaped, kThreads, kBeyond ? 2 : 4>::kStep>(tile, out, chip);
  launch("row_kernel", row_kernel<Out, kShaped, kBeyond, kThreads>, tile.rows, kThreads, kept * int64_t(sizeof(float)),
         stream, tile, out, int(kept));
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
