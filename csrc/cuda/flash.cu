#include "flash.cuh"

namespace longgrpo {
namespace {

bool shaped(const RowTile& tile) { return tile.transform.bias || tile.transform.softcap > 0; }

}  // namespace

void launch_chunk(const RowTile& tile, int64_t column, int64_t columns, const Chunks& chunks, Dtype dtype,
                  Stream stream) {
  const auto go = [&](auto kernel) {
    launch("chunk_kernel", kernel, tile.rows, kFewThreads, 0, stream, tile, column, int(columns), chunks);
  };
  if (!chunks.sums) {
    if (shaped(tile)) return go(chunk_kernel<float, true, false, kFewThreads>);
    return go(chunk_kernel<float, false, false, kFewThreads>);
  }
  with_type(dtype, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    if (shaped(tile)) return go(chunk_kernel<Out, true, true, kFewThreads>);
    go(chunk_kernel<Out, false, true, kFewThreads>);
  });
}

void launch_finish(const RowTile& tile, const RowOutputs& out, const Chunks& chunks, const Direction& direction,
                   Stream stream) {
  with_type(direction.weight_dtype, [&](auto weight_tag) {
    with_type(direction.dtype, [&](auto direction_tag) {
      using Weight = typename decltype(weight_tag)::type;
      using Out = typename decltype(direction_tag)::type;
      const auto go = [&](auto kernel) {
        launch("finish_kernel", kernel, tile.rows, kFewThreads, 0, stream, tile, out, chunks,
               static_cast<const Weight*>(direction.weight), static_cast<Out*>(direction.to));
      };
      if (shaped(tile)) return go(finish_kernel<Weight, Out, true, kFewThreads>);
      go(finish_kernel<Weight, Out, false, kFewThreads>);
    });
  });
}

void launch_weight_rows(const RowTile& tile, int64_t column, int64_t columns, const float* c, const float* logp,
                        const RowNormalizer* normalizer, Dtype dtype, Stream stream) {
  with_type(dtype, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    const auto go = [&](auto kernel) {
      launch("weight_rows_kernel", kernel, tile.rows, kFewThreads, 0, stream, tile, column, int(columns), c, logp,
             normalizer);
    };
    if (shaped(tile)) return go(weight_rows_kernel<Out, true, kFewThreads>);
    go(weight_rows_kernel<Out, false, kFewThreads>);
  });
}

}  // namespace longgrpo
