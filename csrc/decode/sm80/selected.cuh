// The third kernel of a step: attention to the chosen blocks, cut into parts. The last part to finish adds up all three
// branches.
#pragma once

#include "decode/chain.cuh"
#include "decode/parts.cuh"
#include "decode/sm80/ranges.cuh"

namespace nsa {

// Blocks of threads (part, unit, query and tile of heads).
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) decode_selected_sm80(const __grid_constant__ DecodeParams params) {
  using Element = typename Shape::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ SliceExchange<Shape> exchange;
  __shared__ PartList list;
  __shared__ bool last;
  const int32_t tiles = (params.group + Shape::kRows - 1) / Shape::kRows;
  const SelectedPart part(params, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y),
                          static_cast<int32_t>(blockIdx.z), Shape::kRows, tiles);
  start_next();
  if (part.query >= part.sequence.queries) {
    return;
  }
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared + Shape::kRingBytes)};
  const int32_t first_row = part.query * params.group + part.first_head;
  copy_queries<Shape>(q_tile, params, part.sequence, part.unit.head, first_row, first_row + part.heads);
  commit_copies();
  wait_for_previous();
  part.read_list(params, list);
  wait_copies<0>();
  __syncthreads();
  uint32_t q[Shape::kDimK / 16][4];
  load_queries<Shape>(q, q_tile);
  const int32_t count = part.count_keys(params, list);
  RowOffsets* const offsets = reinterpret_cast<RowOffsets*>(shared + Shape::kRingBytes + Shape::kQueryBytes);
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < (count + Shape::kKeys - 1) / Shape::kKeys * Shape::kKeys;
       i += Shape::kThreads) {
    offsets[i] = i < count ? part.locate(params, list, i) : nowhere();
  }
  __syncthreads();
  DecodeSums<Shape> sums;
  clear(sums.out[0]);
  const int32_t low[2] = {0, 0};
  const int32_t high[2] = {count, count};
  attend_stream(sums, key_stream<Shape>(shared, offsets, params.selected, part.unit.head), q, count, low, high,
                params.scale_log2, nullptr, 0);
  float* const buffer = reinterpret_cast<float*>(shared);
  lay_out_slices(sums, exchange, buffer);
  const int64_t place = part.sums_place(params);
  store_partial(exchange, buffer, params.part_out + place * Shape::kDimV, params.part_sums + place, part.heads);
  finish_part<Element>(params, part, tiles, last);
}

}  // namespace nsa
