// The first kernel of a step: partial sums of the compressed and of the window branch, and what blocks weigh.
#pragma once

#include "decode/sm80/chain.cuh"
#include "decode/sm80/stream.cuh"

namespace nsa {

// What a split's keys weigh in the importance of `blocks` selection blocks, relative to a row's highest score, from
// their exponentials: keys [0, count) of a row. By a warp.
__device__ inline void weigh_blocks(const DecodeParams& params, const float* from, int32_t count, int32_t blocks,
                                    float* to) {
  const int32_t covered = params.block_size / params.block_stride;
  const int32_t pieces = params.pieces();
#pragma unroll 1
  for (int32_t block = this_lane(); block < blocks; block += 32) {
    float weight = 0.f;
    const int32_t first = block * pieces;
    if (covered == 2 && pieces == 4) {  // weights 1, 2, 2, 2, 1
      const float before = block > 0 && first <= count ? from[first - 1] : 0.f;
      const float4 x = first < count ? *reinterpret_cast<const float4*>(from + first) : make_float4(0.f, 0.f, 0.f, 0.f);
      weight = (before + x.w) + 2.f * (x.x + x.y + x.z);
    } else {
      const int32_t stop = min(first + pieces, count);
#pragma unroll 1
      for (int32_t m = max(first - covered + 1, 0); m < stop; ++m) {
        weight += from[m] * static_cast<float>(min(m + covered, first + pieces) - max(m, first));
      }
    }
    to[block] = weight;
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) decode_ranges_sm80(const __grid_constant__ DecodeParams params) {
  using Element = typename Shape::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ SliceExchange<Shape> exchange;
  float* const kept = reinterpret_cast<float*>(shared + Shape::kRingBytes + Shape::kQueryBytes);
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared + Shape::kRingBytes)};
  wait_for_previous();
  start_next();

  const int32_t unit = static_cast<int32_t>(blockIdx.y);
  const auto [index, head] = decode_unit(params, unit);
  const int32_t split = static_cast<int32_t>(blockIdx.x);
  const bool compressed = split < params.splits;
  const DecodeSequence sequence = decode_sequence(params, index);
  const int32_t first_row = static_cast<int32_t>(blockIdx.z) * Shape::kRows;
  const int32_t rows = sequence.queries * params.group;
  if (split == 0 && first_row == 0) {
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < params.queries; i += Shape::kThreads) {
      params.finished[unit * params.queries + i] = 0;
    }
  }
  // Keys [first, end) of this split, that any query of the tile may see.
  const int32_t last_row = min(first_row + Shape::kRows, rows) - 1;
  int32_t first = 0;
  int32_t end = 0;
  const CompressedRange visible{params.block_size, params.block_stride};
  const auto position_of = [&](int32_t row) {
    return sequence.position(static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row))));
  };
  if (last_row >= first_row) {
    if (compressed) {
      first = split * params.split_keys();
      end = static_cast<int32_t>(min_of(first + params.split_keys(), visible(position_of(last_row)).end));
    } else {
      const int32_t begin = max(position_of(first_row) + 1 - params.window, 0);
      first = begin + (split - params.splits) * params.window_split_keys;
      end = min(first + params.window_split_keys, position_of(last_row) + 1);
    }
  }
  const int32_t count = max(end - first, 0);
  const int64_t place = (static_cast<int64_t>(unit) * params.all_splits() + split) * params.rows() + first_row;
  RowSums* const row_sums = params.range_sums + place;
  const int32_t of_split = params.weights_of_split();
  float* const weights =
      params.weights + ((static_cast<int64_t>(unit) * params.rows() + first_row) * params.splits + split) * of_split;
  const int64_t weights_step = static_cast<int64_t>(params.splits) * of_split;
  const int32_t here = max(last_row - first_row + 1, 0);
  if (count == 0) {
#pragma unroll 1
    for (int32_t row = static_cast<int32_t>(threadIdx.x); row < here; row += Shape::kThreads) {
      row_sums[row] = {kMinusInfinity, 0.f};
    }
#pragma unroll 1
    for (int32_t row = this_warp(); compressed && row < here; row += Shape::kWarps) {
      for (int32_t i = this_lane(); i < of_split; i += 32) {
        weights[row * weights_step + i] = 0.f;
      }
    }
    return;
  }

  copy_queries<Shape>(q_tile, params, sequence, head, first_row, rows);
  commit_copies();
  const PagedRows& keys = compressed ? params.compressed : params.windowed;
  // Compressed block m is row m + l / d - 1.
  const int32_t shift = first + (compressed ? params.block_size / params.block_stride - 1 : 0);
  const int32_t padded = (count + Shape::kKeys - 1) / Shape::kKeys * Shape::kKeys;
  const int32_t pitch = kept_pitch(compressed ? params.split_keys() : 0, Shape::kKeys);
  RowOffsets* const offsets = reinterpret_cast<RowOffsets*>(kept + (compressed ? Shape::kRows * pitch : 0));
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < padded; i += Shape::kThreads) {
    const int32_t page = static_cast<int32_t>(keys.by_page.divide(static_cast<uint32_t>(shift + i)));
    offsets[i] = row_of_page(keys, i < count ? page_at(params, keys, index, page) : -1,
                             shift + i - page * keys.rows_per_page);
  }
  const KeyStream<Shape> stream{reinterpret_cast<Element*>(shared),
                                offsets,
                                static_cast<const Element*>(keys.k.data) + head * keys.k.head_stride,
                                static_cast<const Element*>(keys.v.data) + head * keys.v.head_stride,
                                keys.k.width,
                                keys.v.width};

  DecodeSums<Shape> sums;
  clear(sums.out[0]);
  uint32_t q[Shape::kDimK / 16][4];
  const int32_t warp_row = first_row + 16 * (this_warp() / Shape::kSlices);
  int32_t low[2];
  int32_t high[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t row = warp_row + this_lane() / 4 + 8 * half;
    const int32_t position = row < rows ? position_of(row) : -1;
    high[half] = min(static_cast<int32_t>(compressed ? visible(position).end : int64_t{position} + 1) - first, count);
    low[half] = compressed ? 0 : position + 1 - params.window - first;
  }
  wait_copies<0>();
  __syncthreads();
  load_queries<Shape>(q, q_tile);
  attend_stream(sums, stream, q, count, low, high, params.scale_log2, compressed ? kept : nullptr, pitch);
  float* const buffer = reinterpret_cast<float*>(shared);
  lay_out_slices(sums, exchange, buffer);
  store_partial(exchange, buffer, params.range_out + place * Shape::kDimV, row_sums, here);
  if (!compressed) {
    return;
  }
#pragma unroll 1
  for (int32_t row = this_warp(); row < here; row += Shape::kWarps) {
    const float highest = exchange.joined[row].highest;
    const float offset = highest == kMinusInfinity ? 0.f : highest;
    float* const of_row = kept + row * pitch;
#pragma unroll 1
    for (int32_t i = this_lane(); i < padded; i += 32) {
      of_row[i] = exp2_approx(of_row[i] - offset);
    }
    __syncwarp();
    weigh_blocks(params, of_row, count, of_split, weights + row * weights_step);
  }
}

}  // namespace nsa
