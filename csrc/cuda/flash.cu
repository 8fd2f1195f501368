#include "flash.cuh"

namespace longgrpo {
namespace {

constexpr int kHiddenThreads = 256;

}  // namespace

void launch_chunk(const RowTile& tile, int64_t column, int64_t columns, ChunkState* state, bool gradient, Dtype dtype,
                  Stream stream) {
  const auto go = [&](auto few, auto many) {
    const bool is_few = tile.transform.vocabulary <= kFewColumns;
    launch("chunk_kernel", is_few ? few : many, tile.rows, is_few ? kFewThreads : kManyThreads, 0, stream, tile, column,
           int(columns), state);
  };
  const bool shaped = tile.transform.bias || tile.transform.softcap > 0;
  if (!gradient) {
    if (shaped)
      return go(chunk_kernel<float, true, false, kFewThreads>, chunk_kernel<float, true, false, kManyThreads>);
    return go(chunk_kernel<float, false, false, kFewThreads>, chunk_kernel<float, false, false, kManyThreads>);
  }
  with_type(dtype, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    if (shaped) return go(chunk_kernel<Out, true, true, kFewThreads>, chunk_kernel<Out, true, true, kManyThreads>);
    go(chunk_kernel<Out, false, true, kFewThreads>, chunk_kernel<Out, false, true, kManyThreads>);
  });
}

void launch_finish(const RowTile& tile, const RowOutputs& out, const ChunkState* state, const float* sums,
                   const void* weight, Dtype weight_dtype, void* direction, Dtype direction_dtype, int64_t hidden,
                   Stream stream) {
  const bool shaped = tile.transform.bias || tile.transform.softcap > 0;
  with_type(weight_dtype, [&](auto weight_tag) {
    with_type(direction_dtype, [&](auto direction_tag) {
      using Weight = typename decltype(weight_tag)::type;
      using Out = typename decltype(direction_tag)::type;
      const auto go = [&](auto kernel) {
        launch("finish_kernel", kernel, tile.rows, kHiddenThreads, 0, stream, tile, out, state, sums,
               static_cast<const Weight*>(weight), static_cast<Out*>(direction), hidden);
      };
      if (shaped) return go(finish_kernel<Weight, Out, true, kHiddenThreads>);
      go(finish_kernel<Weight, Out, false, kHiddenThreads>);
    });
  });
}

void launch_rescale_add(float* sums, const float* product, const ChunkState* state, int64_t rows, int64_t hidden,
                        Stream stream) {
  launch("rescale_add_kernel", rescale_add_kernel<kHiddenThreads>, rows, kHiddenThreads, 0, stream, sums, product,
         state, hidden);
}

}  // namespace longgrpo
