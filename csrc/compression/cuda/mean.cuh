// phi = mean: out[m] = 1/l sum over the l tokens of block m, and its transpose. Sums are float32; bound by HBM, as the
// l/d blocks that share a token find it in a cache.
//
// Grid: forward a block of threads for each row of blocks, backward for each d tokens, which gather from at most l/d
// blocks.
#pragma once

#include "compression/cuda/elements.cuh"
#include "compression/cuda/layout.cuh"

namespace nsa {

template <typename Element, int kWidth>
__global__ void __launch_bounds__(256) mean_forward(const __grid_constant__ MeanParams params) {
  const int64_t chunk = first_chunk(params.layout, blockIdx.x);
  const ChunkPlace place = chunk < 0 ? no_chunk() : place_of_chunk(params.layout, static_cast<uint32_t>(chunk));
  const int64_t count = place.token < 0 ? 0 : params.layout.block_size;
  const auto divisor = static_cast<float>(params.layout.block_size);
  for (uint32_t number = threadIdx.x; number < params.items.count; number += blockDim.x) {
    const Item item = item_at<kWidth>(params.items, number);
    float sum[kWidth] = {};
    const Element* from = params.tokens.row<const Element>(place.batch, place.token, item.head) + item.column;
#pragma unroll 4
    for (int64_t i = 0; i < count; ++i) {
      add_columns(sum, from);
      from += params.tokens.token_stride;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] /= divisor;
    }
    store_columns(params.blocks.row<Element>(blockIdx.x, item.head) + item.column, sum);
  }
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(256) mean_backward(const __grid_constant__ MeanParams params) {
  const BlockLayout& layout = params.layout;
  const TokenGroup group(layout, blockIdx.x);
  const auto divisor = static_cast<float>(layout.block_size);
  for (uint32_t number = threadIdx.x; number < params.items.count; number += blockDim.x) {
    const Item item = item_at<kWidth>(params.items, number);
    if (item.token >= group.count) {
      return;
    }
    const int64_t token = group.first_token + item.token;
    const bool own = group.in_own(token);
    float sum[kWidth] = {};
    if (own || group.in_before(token, layout.block_stride)) {
      const int64_t index = own ? group.own.index : group.before.index;
      const int64_t blocks = own ? group.own.blocks : group.before.blocks;
      const int64_t block = own ? group.own.block : group.before.block;
      const int64_t end = min_of(index + 1, layout.pieces);
      for (int64_t piece = max_of(index - blocks + 1, 0); piece < end; ++piece) {
        add_columns(sum, params.blocks.row<const Element>(block - piece, item.head) + item.column);
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] /= divisor;
    }
    store_columns(params.tokens.row<Element>(group.batch, token, item.head) + item.column, sum);
  }
}

}  // namespace nsa
