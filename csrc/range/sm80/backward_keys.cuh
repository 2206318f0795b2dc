// Attention over a range of keys, backward: the gradients of k and v. A block of threads holds a tile of keys and walks
// the rows that see any of them, or one split of those rows.
#pragma once

#include "common/keys.cuh"
#include "common/sm80/key_gradients.cuh"
#include "range/params.h"

namespace nsa {

// The tile of keys of a block of threads, and the rows that see it.
struct RangeKeyTile {
  SequencePlace place;
  KeysPlace keys;
  int32_t first_key;
  int32_t count;      // keys that exist
  int32_t first_row;  // rows [first_row, end_row) see some of them
  int32_t end_row;

  __device__ int32_t splits(const RangeBackwardParams& params) const {
    const int64_t needed = ceil_div(end_row - first_row, params.rows_per_split);
    return static_cast<int32_t>(needed < 1 ? 1 : needed);
  }
};

template <int kKeys>
__device__ inline RangeKeyTile range_key_tile(const RangeBackwardParams& params, int64_t slot) {
  const SequenceLayout& s = params.sequences;
  const Tile tile =
      find_tile(s, params.compressed ? s.cumulative_cmp : s.cumulative_k, 1, params.num_keys, kKeys, slot);
  RangeKeyTile result{};
  result.place = place_of(s, tile.sequence);
  result.keys = keys_of(result.place, params.visibility, params.compressed);
  if (!s.packed()) {
    result.keys.length = static_cast<int32_t>(params.num_keys);
  }
  result.first_key = tile.index * kKeys;
  result.count = min(kKeys, result.keys.length - result.first_key);
  if (result.count <= 0) {
    result.count = 0;
    return result;
  }
  const int64_t offset = result.place.offset;
  const int64_t first = max_of(params.visibility.first_position(result.first_key) - offset, 0);
  const int64_t last =
      min_of(params.visibility.last_position(result.first_key + result.count - 1) - offset, result.place.q_length - 1);
  if (first <= last) {
    result.first_row = static_cast<int32_t>(first * s.group);
    result.end_row = static_cast<int32_t>((last + 1) * s.group);
  }
  return result;
}

// To the gradients, or where rows are split to this split's partial sums.
template <typename Shape>
__device__ inline void store_tile(const RangeBackwardParams& params, const RangeKeyTile& tile,
                                  const KeyGradients<Shape>& sums) {
  using Element = typename Shape::Element;
  const unsigned heads = static_cast<unsigned>(params.sequences.heads_kv);
  const int part = static_cast<int>(blockIdx.x % Shape::kParts);
  if (tile.splits(params) > 1) {
    constexpr int kRowSize = Shape::kDimK + Shape::kDimV;
    float* const to = params.partials + int64_t{blockIdx.x / Shape::kParts} * (Shape::kKeys * kRowSize);
    store_partial<kRowSize>(to, part * Shape::kOutK, sums.k, params.scale);
    store_partial<kRowSize>(to, Shape::kDimK + part * Shape::kOutV, sums.v, 1.f);
    return;
  }
  const int32_t head_kv =
      static_cast<int32_t>(blockIdx.x / Shape::kParts / static_cast<unsigned>(params.splits) % heads);
  const int64_t batch = tile.place.batch;
  const int64_t first_key = tile.keys.begin + tile.first_key;
  store_key_gradients<Element>(params.grad_k.row<Element>(batch, first_key, head_kv), params.grad_k.token_stride,
                               tile.count, params.grad_k.width, part * Shape::kOutK, sums.k, params.scale);
  store_key_gradients<Element>(params.grad_v.row<Element>(batch, first_key, head_kv), params.grad_v.token_stride,
                               tile.count, params.grad_v.width, part * Shape::kOutV, sums.v, 1.f);
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    range_backward_keys_sm80(const __grid_constant__ RangeBackwardParams params) {
  using Element = typename Shape::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  const SequenceLayout& s = params.sequences;
  // The earliest keys are seen by the most rows: they go first.
  unsigned block = blockIdx.x;
  const int part = static_cast<int>(block % Shape::kParts);
  block /= Shape::kParts;
  const int32_t split = static_cast<int32_t>(block % static_cast<unsigned>(params.splits));
  block /= static_cast<unsigned>(params.splits);
  const int32_t head_kv = static_cast<int32_t>(block % static_cast<unsigned>(s.heads_kv));
  const RangeKeyTile tile = range_key_tile<Shape::kKeys>(params, block / static_cast<unsigned>(s.heads_kv));
  const int32_t splits = tile.splits(params);
  if (tile.count == 0 || split >= splits) {
    return;
  }
  // Kept for the end in shared memory: in the loop every register counts.
  __shared__ RangeKeyTile kept_tile;
  if (threadIdx.x == 0) {
    kept_tile = tile;
  }
  const SequencePlace& place = tile.place;
  const int64_t first_key = tile.keys.begin + tile.first_key;
  const int32_t begin = tile.first_row + split * params.rows_per_split;
  const int32_t end = min(tile.end_row, begin + params.rows_per_split);
  KeyGradients<Shape> sums;
  sum_key_gradients<Shape>(
      sums,
      {params.k.row<Element>(place.batch, first_key, head_kv), params.v.row<Element>(place.batch, first_key, head_kv),
       params.k.token_stride, params.v.token_stride, tile.first_key, tile.count, place.batch,
       static_cast<int32_t>(place.offset - place.q_begin)},
      {params.q, params.grad_out, params.lse, params.delta, params.gate, params.grad_lse}, params.visibility,
      params.scale, begin, end, part, shared, [&](int32_t row) -> PlacedRow {
        const Row at = row_at(s, head_kv, row);
        return {static_cast<int32_t>(place.q_begin) + at.query, at.head};
      });
  __syncthreads();
  store_tile<Shape>(params, kept_tile, sums);
}

// One block of threads for each key tile and KV head.
template <typename Shape>
__global__ void __launch_bounds__(256) range_add_partials_sm80(const __grid_constant__ RangeBackwardParams params) {
  using Element = typename Shape::Element;
  const unsigned heads = static_cast<unsigned>(params.sequences.heads_kv);
  const int32_t head_kv = static_cast<int32_t>(blockIdx.x % heads);
  const RangeKeyTile tile = range_key_tile<Shape::kKeys>(params, blockIdx.x / heads);
  const int32_t splits = tile.splits(params);
  if (tile.count == 0 || splits <= 1) {
    return;
  }
  const int64_t first_key = tile.keys.begin + tile.first_key;
  const float* const partials =
      params.partials + int64_t{blockIdx.x} * params.splits * Shape::kKeys * (Shape::kDimK + Shape::kDimV);
  add_partials<Shape>(partials, splits, params.grad_k.row<Element>(tile.place.batch, first_key, head_kv),
                      params.grad_k.token_stride, params.grad_k.width,
                      params.grad_v.row<Element>(tile.place.batch, first_key, head_kv), params.grad_v.token_stride,
                      params.grad_v.width, tile.count);
}

}  // namespace nsa
