// The first kernel of a step: partial sums of the compressed and of the window branch, and what their keys weigh in the
// importance of selection blocks.
#pragma once

#include "decode/chain.cuh"
#include "decode/ranges.cuh"
#include "decode/sm80/stream.cuh"

namespace nsa {

template <typename Shape>
__device__ inline KeyStream<Shape> key_stream(unsigned char* shared, const RowOffsets* offsets, const PagedRows& keys,
                                              int32_t head) {
  using Element = typename Shape::Element;
  return {reinterpret_cast<Element*>(shared),
          offsets,
          static_cast<const Element*>(keys.k.data) + head * keys.k.head_stride,
          static_cast<const Element*>(keys.v.data) + head * keys.v.head_stride,
          keys.k.width,
          keys.v.width};
}

// Which keys of a split the lane's two rows see.
struct LaneRanges {
  int32_t low[2];
  int32_t high[2];

  __device__ LaneRanges(const DecodeParams& params, const RangeSplit& split, int32_t warp_row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyRange seen = split.seen(params, warp_row + this_lane() / 4 + 8 * half);
      low[half] = static_cast<int32_t>(seen.begin);
      high[half] = static_cast<int32_t>(seen.end);
    }
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) decode_ranges_sm80(const __grid_constant__ DecodeParams params) {
  using Element = typename Shape::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ SliceExchange<Shape> exchange;
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared + Shape::kRingBytes)};
  wait_for_previous();
  start_next();
  const RangeSplit split(params, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(blockIdx.y),
                         static_cast<int32_t>(blockIdx.z) * Shape::kRows, Shape::kRows);
  if (!begin_split(params, split)) {
    return;
  }
  copy_queries<Shape>(q_tile, params, split.sequence, split.unit.head, split.first_row, split.rows);
  commit_copies();
  const PagedRows& keys = split.keys(params);
  float* const kept = reinterpret_cast<float*>(shared + Shape::kRingBytes + Shape::kQueryBytes);
  const int32_t pitch = decode_tiles::kept_pitch(split.compressed ? params.split_keys() : 0, Shape::kKeys);
  RowOffsets* const offsets = reinterpret_cast<RowOffsets*>(kept + (split.compressed ? Shape::kRows * pitch : 0));
  const int32_t padded = (split.count + Shape::kKeys - 1) / Shape::kKeys * Shape::kKeys;
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < padded; i += Shape::kThreads) {
    offsets[i] = i < split.count ? locate_row(params, keys, split.unit.index, split.shift + i) : nowhere();
  }
  DecodeSums<Shape> sums;
  clear(sums.out[0]);
  const LaneRanges ranges(params, split, split.first_row + 16 * (this_warp() / Shape::kSlices));
  wait_copies<0>();
  __syncthreads();
  uint32_t q[Shape::kDimK / 16][4];
  load_queries<Shape>(q, q_tile);
  attend_stream(sums, key_stream<Shape>(shared, offsets, keys, split.unit.head), q, split.count, ranges.low,
                ranges.high, params.scale_log2, split.compressed ? kept : nullptr, pitch);
  float* const buffer = reinterpret_cast<float*>(shared);
  lay_out_slices(sums, exchange, buffer);
  const int64_t place = split.place(params);
  store_partial(exchange, buffer, params.range_out + place * Shape::kDimV, params.range_sums + place, split.here);
  if (split.compressed) {
    weigh_split(params, split, kept, pitch, padded, [&](int32_t row) { return exchange.joined[row].highest; });
  }
}

}  // namespace nsa
