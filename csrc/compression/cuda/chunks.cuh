// Tokens (B, T, H, D) to and from chunks (chunks, H, d D), the left-hand sides of cuBLAS's products: copies, bound by
// HBM.
//
// Grid: gather has a block of threads for each row of chunks, scatter for each d tokens: every token is written once,
// so there is nothing to clear and nothing to add up. `Unit` is 16 bytes, or an element where rows aren't aligned;
// strides, widths and columns count units.
#pragma once

#include "compression/cuda/elements.cuh"
#include "compression/cuda/layout.cuh"

namespace nsa {

template <typename Unit>
__device__ inline Unit zero_unit() {
  return Unit{};
}

template <typename Unit>
__global__ void __launch_bounds__(256) gather_chunks(const __grid_constant__ MoveChunksParams params) {
  const ChunkPlace place = place_of_chunk(params.layout, blockIdx.x);
  for (uint32_t number = threadIdx.x; number < params.items.count; number += blockDim.x) {
    const Item item = item_at<1>(params.items, number);
    Unit unit = zero_unit<Unit>();
    if (place.token >= 0) {
      unit = params.tokens.row<const Unit>(place.batch, place.token + item.token, item.head)[item.column];
    }
    params.chunks.row<Unit>(blockIdx.x, item.head)[int64_t{item.token} * params.items.width + item.column] = unit;
  }
}

template <typename Unit>
__global__ void __launch_bounds__(256) scatter_chunks(const __grid_constant__ MoveChunksParams params) {
  const int64_t block_stride = params.layout.block_stride;
  const TokenGroup group(params.layout, blockIdx.x);
  for (uint32_t number = threadIdx.x; number < params.items.count; number += blockDim.x) {
    const Item item = item_at<1>(params.items, number);
    if (item.token >= group.count) {
      return;
    }
    const int64_t token = group.first_token + item.token;
    const bool own = group.in_own(token);
    Unit unit = zero_unit<Unit>();
    if (own || group.in_before(token, block_stride)) {
      const int64_t within = token - (own ? group.own.token : group.before.token);
      const Unit* const from = params.chunks.row<const Unit>(own ? group.row : group.row - 1, item.head);
      unit = from[within * params.items.width + item.column];
    }
    params.tokens.row<Unit>(group.batch, token, item.head)[item.column] = unit;
  }
}

}  // namespace nsa
