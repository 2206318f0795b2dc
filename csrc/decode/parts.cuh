// A part of a query's chosen blocks, and the sum of all parts and branches. For the kernels of every machine.
#pragma once

#include "common/gates.cuh"
#include "common/softmax.cuh"
#include "decode/ranges.cuh"
#include "decode/tiles.h"

namespace nsa {

// What a block of threads keeps of its part's list.
struct PartList {
  int32_t blocks[decode_tiles::kMostPartBlocks];
  int32_t pages[decode_tiles::kMostPartBlocks];
};

struct SelectedPart {
  DecodeUnit unit;
  int32_t unit_index;
  int32_t number;  // of the part
  int32_t query;
  int32_t first_head;  // of the group
  int32_t heads;       // of the tile
  DecodeSequence sequence;
  int64_t place;  // of the query's list, in lists

  // `tile`: query, then tile of heads.
  __device__ SelectedPart(const DecodeParams& params, int32_t part, int32_t unit_, int32_t tile, int32_t tile_heads,
                          int32_t tiles)
      : unit(decode_unit(params, unit_)),
        unit_index(unit_),
        number(part),
        query(tile / tiles),
        first_head(tile % tiles * tile_heads),
        heads(min(params.group - first_head, tile_heads)),
        sequence(decode_sequence(params, unit.index)),
        place(static_cast<int64_t>(unit_) * params.queries + query) {}

  __device__ void read_list(const DecodeParams& params, PartList& list) const {
    const int32_t i = static_cast<int32_t>(threadIdx.x);
    const int32_t at = number * params.part_blocks + i;
    if (i < params.part_blocks) {
      list.blocks[i] = at < params.num_selected ? params.block_indices[place * params.num_selected + at] : -1;
      list.pages[i] = list.blocks[i] >= 0 ? params.block_pages[place * params.num_selected + at] : -1;
    }
  }

  // Keys that the part's blocks hold and the query sees: all but the end of its own block.
  __device__ int32_t count_keys(const DecodeParams& params, const PartList& list) const {
    int32_t blocks = 0;
#pragma unroll 1
    while (blocks < params.part_blocks && list.blocks[blocks] >= 0) {
      ++blocks;
    }
    if (blocks == 0) {
      return 0;
    }
    const int32_t past = (list.blocks[blocks - 1] + 1) * params.select_size - 1 - sequence.position(query);
    return blocks * params.select_size - max(past, 0);
  }

  // Key i of the part.
  __device__ RowOffsets locate(const DecodeParams& params, const PartList& list, int32_t i) const {
    const PagedRows& keys = params.selected;
    const int32_t at = static_cast<int32_t>(params.by_select_size.divide(static_cast<uint32_t>(i)));
    const int32_t row = (list.blocks[at] - at) * params.select_size + i;
    const int32_t page = static_cast<int32_t>(keys.by_page.divide(static_cast<uint32_t>(row)));
    return row_of_page(keys, list.pages[at], row - page * keys.rows_per_page);
  }

  // The tile's first row in part_sums, and in units of a row in part_out.
  __device__ int64_t sums_place(const DecodeParams& params) const {
    return (place * params.parts + number) * params.group + first_head;
  }
};

template <typename Element>
__device__ inline void write_four(Element* to, const float4& x, int32_t count) {
  const float numbers[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      to[i] = from_float<Element>(numbers[i]);
    }
  }
}

// Four columns of one head's output: the parts of the selected branch, and what the other branches gave.
__device__ inline float4 add_parts(const DecodeParams& params, const SelectedPart& part, int32_t g, int32_t column) {
  const int64_t first = part.place * params.parts * params.group + g;
  const RowSums* const sums = params.part_sums + first;
  const float* const outs = params.part_out + first * params.columns + column;
  float4 out = __ldcg(reinterpret_cast<const float4*>(
      params.gated +
      (static_cast<int64_t>(part.unit_index) * params.rows() + part.query * params.group + g) * params.columns +
      column));
  float highest = kMinusInfinity;
  float total = 0.f;
  float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
  for (int32_t s = 0; s < params.parts; ++s) {
    const float2 of_part = __ldcg(reinterpret_cast<const float2*>(sums + s * params.group));
    const float4 x =
        __ldcg(reinterpret_cast<const float4*>(outs + static_cast<int64_t>(s) * params.group * params.columns));
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
  const float gate = load_gate(params.gates, part.sequence.batch, part.sequence.first + part.query,
                               part.unit.head * params.group + g, 1);
  const float factor = total > 0.f ? gate / total : 0.f;
  out.x = fmaf(factor, sum.x, out.x);
  out.y = fmaf(factor, sum.y, out.y);
  out.z = fmaf(factor, sum.z, out.z);
  out.w = fmaf(factor, sum.w, out.w);
  return out;
}

// Counts this part as done; the last of a query's parts adds all up and writes the output. By all threads.
template <typename Element>
__device__ inline void finish_part(const DecodeParams& params, const SelectedPart& part, int32_t tiles, bool& last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&params.finished[part.place], 1) == params.parts * tiles - 1;
  }
  __syncthreads();
  if (!last) {
    return;
  }
  __threadfence();
  const int32_t chunks = params.columns / 4;
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < params.group * chunks;
       i += static_cast<int32_t>(blockDim.x)) {
    const int32_t g = i / chunks;
    const int32_t column = 4 * (i - g * chunks);
    Element* const to = params.out.row<Element>(part.sequence.batch, part.sequence.first + part.query,
                                                part.unit.head * params.group + g);
    write_four(to + column, add_parts(params, part, g, column), params.out.width - column);
  }
}

}  // namespace nsa
