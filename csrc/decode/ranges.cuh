// A split of the compressed or the window branch's keys, for a tile of a unit's rows: what it holds, where its results
// go, and what it weighs. For the kernels of every machine.
#pragma once

#include "common/rows.cuh"
#include "common/sm80/mma.cuh"
#include "decode/params.h"

namespace nsa {

// Where a row lies in the pools of keys and of values, in elements; below 0: nowhere.
struct RowOffsets {
  int64_t k;
  int64_t v;
};
__device__ inline RowOffsets nowhere() { return {-1, -1}; }

// A table's entry; -1, with a fault, where the pool lacks that page.
__device__ inline int32_t checked_page(const DecodeParams& params, const PagedRows& rows, int32_t page) {
  if (page < 0 || page >= rows.k.pages) {
    if (params.faults != nullptr) {
      *params.faults = 1;
    }
    return -1;
  }
  return page;
}
__device__ inline int32_t page_at(const DecodeParams& params, const PagedRows& rows, int64_t sequence, int32_t index) {
  return checked_page(params, rows, index < rows.table_width ? rows.table[sequence * rows.table_stride + index] : -1);
}

__device__ inline RowOffsets row_of_page(const PagedRows& rows, int32_t page, int32_t row) {
  if (page < 0) {
    return nowhere();
  }
  return {page * rows.k.page_stride + row * rows.k.row_stride, page * rows.v.page_stride + row * rows.v.row_stride};
}

// Row `row` of a sequence.
__device__ inline RowOffsets locate_row(const DecodeParams& params, const PagedRows& rows, int64_t sequence,
                                        int32_t row) {
  const int32_t page = static_cast<int32_t>(rows.by_page.divide(static_cast<uint32_t>(row)));
  return row_of_page(rows, page_at(params, rows, sequence, page), row - page * rows.rows_per_page);
}

struct RangeSplit {
  DecodeUnit unit;
  int32_t unit_index;
  int32_t number;  // of the split
  bool compressed;
  DecodeSequence sequence;
  int32_t first_row;
  int32_t rows;   // of the unit
  int32_t here;   // of the tile
  int32_t first;  // key
  int32_t count;  // of keys that any row of the tile sees
  int32_t shift;  // key i of the split is row shift + i of the sequence: compressed block m is row m + l / d - 1

  __device__ RangeSplit(const DecodeParams& params, int32_t split, int32_t unit_, int32_t first_row_, int32_t tile_rows)
      : unit(decode_unit(params, unit_)),
        unit_index(unit_),
        number(split),
        compressed(split < params.splits),
        sequence(decode_sequence(params, unit.index)),
        first_row(first_row_),
        rows(sequence.queries * params.group),
        here(max(min(first_row_ + tile_rows, rows) - first_row_, 0)),
        first(0),
        count(0),
        shift(0) {
    if (here == 0) {
      return;
    }
    int32_t end = 0;
    const int32_t last = position(params, first_row + here - 1);
    if (compressed) {
      first = split * params.split_keys();
      end = min(first + params.split_keys(), blocks_before(params, last));
    } else {
      first =
          max(position(params, first_row) + 1 - params.window, 0) + (split - params.splits) * params.window_split_keys;
      end = min(first + params.window_split_keys, last + 1);
    }
    count = max(end - first, 0);
    shift = first + (compressed ? params.covered - 1 : 0);
  }

  __device__ int32_t position(const DecodeParams& params, int32_t row) const {
    return sequence.position(static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row))));
  }
  // Keys of the split that a row sees.
  __device__ KeyRange seen(const DecodeParams& params, int32_t row) const {
    if (row >= rows) {
      return {0, 0};
    }
    const int32_t at = position(params, row);
    const int32_t end = min((compressed ? blocks_before(params, at) : at + 1) - first, count);
    return {compressed ? 0 : at + 1 - params.window - first, end};
  }
  __device__ const PagedRows& keys(const DecodeParams& params) const {
    return compressed ? params.compressed : params.windowed;
  }
  // The tile's first row in range_sums, and in units of a row in range_out.
  __device__ int64_t place(const DecodeParams& params) const {
    return (static_cast<int64_t>(unit_index) * params.all_splits() + number) * params.rows() + first_row;
  }
  __device__ float* weights(const DecodeParams& params, int32_t row) const {
    return params.weights +
           ((static_cast<int64_t>(unit_index) * params.rows() + first_row + row) * params.splits + number) *
               params.weights_of_split();
  }
};

// Whether a split has any keys; where not, its results are written.
__device__ inline bool begin_split(const DecodeParams& params, const RangeSplit& split) {
  const int32_t threads = static_cast<int32_t>(blockDim.x);
  if (split.number == 0 && split.first_row == 0) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < params.queries; i += threads) {
      params.finished[split.unit_index * params.queries + i] = 0;
    }
  }
  if (split.count > 0) {
    return true;
  }
  RowSums* const sums = params.range_sums + split.place(params);
#pragma unroll 1
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < split.here; row += threads) {
    sums[row] = {kMinusInfinity, 0.f};
  }
#pragma unroll 1
  for (int32_t row = 0; split.compressed && row < split.here; ++row) {
    float* const to = split.weights(params, row);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < params.weights_of_split(); i += threads) {
      to[i] = 0.f;
    }
  }
  return false;
}

// What a row's keys [0, count) weigh in the importance of selection block `block` of theirs, from their exponentials.
// Past the last of their blocks come those that the last keys reach into.
__device__ inline float block_weight(const DecodeParams& params, const float* from, int32_t count, int32_t block) {
  const int32_t covered = params.covered;
  const int32_t pieces = params.pieces;
  const int32_t first = block * pieces;
  if (covered == 2 && pieces == 4) {  // weights 1, 2, 2, 2, 1
    const float before = block > 0 && first <= count ? from[first - 1] : 0.f;
    const float4 x = first < count ? *reinterpret_cast<const float4*>(from + first) : make_float4(0.f, 0.f, 0.f, 0.f);
    return (before + x.w) + 2.f * (x.x + x.y + x.z);
  }
  float weight = 0.f;
  const int32_t stop = min(first + pieces, count);
#pragma unroll 1
  for (int32_t m = max(first - covered + 1, 0); m < stop; ++m) {
    weight += from[m] * static_cast<float>(min(m + covered, first + pieces) - max(m, first));
  }
  return weight;
}

// Those of all blocks of a split. By a warp.
__device__ inline void weigh_blocks(const DecodeParams& params, const float* from, int32_t count, float* to) {
#pragma unroll 1
  for (int32_t block = static_cast<int32_t>(threadIdx.x) % 32; block < params.weights_of_split(); block += 32) {
    to[block] = block_weight(params, from, count, block);
  }
}

// The same for all rows of the tile, from their kept scores (rows, pitch), of which `padded` are set: those beyond
// `count` to -inf. A warp for each row.
template <typename Highest>
__device__ inline void weigh_split(const DecodeParams& params, const RangeSplit& split, float* kept, int32_t pitch,
                                   int32_t padded, const Highest& highest_of) {
#pragma unroll 1
  for (int32_t row = static_cast<int32_t>(threadIdx.x) / 32; row < split.here;
       row += static_cast<int32_t>(blockDim.x) / 32) {
    const float highest = highest_of(row);
    const float offset = highest == kMinusInfinity ? 0.f : highest;
    float* const of_row = kept + row * pitch;
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x) % 32; i < padded; i += 32) {
      of_row[i] = exp2f(of_row[i] - offset);
    }
    __syncwarp();
    weigh_blocks(params, of_row, split.count, split.weights(params, row));
  }
}

}  // namespace nsa
