// The third kernel of a step: attention to the chosen blocks, cut into parts. The last part to finish adds up all three
// branches.
#pragma once

#include "common/gates.cuh"
#include "decode/sm80/chain.cuh"
#include "decode/sm80/stream.cuh"

namespace nsa {

// Most blocks of a part.
constexpr int kMostPartBlocks = 64;

template <typename Element>
__device__ inline void write_pair(Element* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack<Element>(x, y);
}

// Most parts of a query's list.
constexpr int kMostParts = 16;

// Rows of the output of one query: parts of the selected branch, then what the other branches gave.
template <typename Shape>
__device__ inline void add_parts(const DecodeParams& params, int32_t unit, const DecodeSequence& sequence, int32_t head,
                                 int32_t query) {
  using Element = typename Shape::Element;
  constexpr int kChunks = Shape::kDimV / 4;
  const int64_t place = (static_cast<int64_t>(unit) * params.queries + query) * params.parts * params.group;
  const RowSums* const sums = params.part_sums + place;
  const float* const outs = params.part_out + place * Shape::kDimV;
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < params.group * kChunks; i += Shape::kThreads) {
    const int32_t g = i / kChunks;
    const int32_t column = 4 * (i - g * kChunks);
    const int32_t query_head = head * params.group + g;
    const float gate = load_gate(params.gates, sequence.batch, sequence.first + query, query_head, 1);
    float4 out = __ldcg(reinterpret_cast<const float4*>(
        params.gated + (static_cast<int64_t>(unit) * params.rows() + query * params.group + g) * Shape::kDimV +
        column));
    float highest = kMinusInfinity;
    float total = 0.f;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int32_t s = 0; s < params.parts; ++s) {
      const float2 of_part = __ldcg(reinterpret_cast<const float2*>(sums + s * params.group + g));
      const float4 x = __ldcg(
          reinterpret_cast<const float4*>(outs + static_cast<int64_t>(s * params.group + g) * Shape::kDimV + column));
      const float now = fmaxf(highest, of_part.x);
      const float before = rescaling(highest, now, 1.f);
      const float weight = rescaling(of_part.x, now, 1.f);
      highest = now;
      total = total * before + of_part.y * weight;
      sum.x = sum.x * before + x.x * weight;
      sum.y = sum.y * before + x.y * weight;
      sum.z = sum.z * before + x.z * weight;
      sum.w = sum.w * before + x.w * weight;
    }
    const float factor = total > 0.f ? gate / total : 0.f;
    out.x = fmaf(factor, sum.x, out.x);
    out.y = fmaf(factor, sum.y, out.y);
    out.z = fmaf(factor, sum.z, out.z);
    out.w = fmaf(factor, sum.w, out.w);
    Element* const to = params.out.row<Element>(sequence.batch, sequence.first + query, query_head) + column;
    if (column + 4 <= params.out.width) {
      write_pair(to, out.x, out.y);
      write_pair(to + 2, out.z, out.w);
    }
  }
}

// Blocks of threads (part, unit, query). kRowTiles hold the group.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) decode_selected_sm80(const __grid_constant__ DecodeParams params) {
  using Element = typename Shape::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ SliceExchange<Shape> exchange;
  __shared__ int32_t listed[kMostPartBlocks];
  __shared__ int32_t pages[kMostPartBlocks];
  __shared__ bool last;
  const int32_t unit = static_cast<int32_t>(blockIdx.y);
  const auto [index, head] = decode_unit(params, unit);
  const int32_t query = static_cast<int32_t>(blockIdx.z);
  const int32_t part = static_cast<int32_t>(blockIdx.x);
  const DecodeSequence sequence = decode_sequence(params, index);
  start_next();
  if (query >= sequence.queries) {
    return;
  }
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared + Shape::kRingBytes)};
  copy_queries<Shape>(q_tile, params, sequence, head, query * params.group, (query + 1) * params.group);
  commit_copies();
  const int32_t position = sequence.position(query);
  const PagedRows& keys = params.selected;
  const int32_t first = part * params.part_blocks;
  const int32_t most = min(params.part_blocks, params.num_selected - first);
  const int64_t list = (static_cast<int64_t>(unit) * params.queries + query) * params.num_selected + first;
  wait_for_previous();
  if (static_cast<int32_t>(threadIdx.x) < most) {
    listed[threadIdx.x] = params.block_indices[list + threadIdx.x];
    pages[threadIdx.x] = params.block_pages[list + threadIdx.x];
  }
  DecodeSums<Shape> sums;
  clear(sums.out[0]);
  uint32_t q[Shape::kDimK / 16][4];
  wait_copies<0>();
  __syncthreads();
  load_queries<Shape>(q, q_tile);
  int32_t blocks = 0;
  while (blocks < most && listed[blocks] >= 0) {
    ++blocks;
  }
  int32_t count = blocks * params.select_size;
  if (blocks > 0) {
    count -= max((listed[blocks - 1] + 1) * params.select_size - 1 - position, 0);
  }
  RowOffsets* const offsets = reinterpret_cast<RowOffsets*>(shared + Shape::kRingBytes + Shape::kQueryBytes);
  const int32_t padded = (count + Shape::kKeys - 1) / Shape::kKeys * Shape::kKeys;
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < padded; i += Shape::kThreads) {
    if (i < count) {
      const int32_t at = static_cast<int32_t>(params.by_select_size.divide(static_cast<uint32_t>(i)));
      const int32_t row = (listed[at] - at) * params.select_size + i;
      const int32_t page = static_cast<int32_t>(keys.by_page.divide(static_cast<uint32_t>(row)));
      offsets[i] = row_of_page(keys, pages[at], row - page * keys.rows_per_page);
    } else {
      offsets[i] = {kNowhere, kNowhere};
    }
  }
  __syncthreads();
  const KeyStream<Shape> stream{reinterpret_cast<Element*>(shared),
                                offsets,
                                static_cast<const Element*>(keys.k.data) + head * keys.k.head_stride,
                                static_cast<const Element*>(keys.v.data) + head * keys.v.head_stride,
                                keys.k.width,
                                keys.v.width};
  const int32_t low[2] = {0, 0};
  const int32_t high[2] = {count, count};
  attend_stream(sums, stream, q, count, low, high, params.scale_log2, nullptr, 0);
  float* const buffer = reinterpret_cast<float*>(shared);
  lay_out_slices(sums, exchange, buffer);
  const int64_t place =
      ((static_cast<int64_t>(unit) * params.queries + query) * params.parts + part) * params.group;
  store_partial(exchange, buffer, params.part_out + place * Shape::kDimV, params.part_sums + place, params.group);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&params.finished[unit * params.queries + query], 1) == params.parts - 1;
  }
  __syncthreads();
  if (last) {
    __threadfence();
    add_parts<Shape>(params, unit, sequence, head, query);
  }
}

}  // namespace nsa
