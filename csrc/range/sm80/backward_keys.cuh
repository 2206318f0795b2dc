// Attention over a range of keys, backward: the gradients of k and v. A block of threads holds a tile of keys and walks
// the rows that see any of them, or one split of those rows.
#pragma once

#include "common/sm80/key_gradients.cuh"
#include "common/sm80/write_key_gradients.cuh"
#include "range/key_tile.cuh"

namespace nsa {

// The tile of keys of a block of threads, and the rows that see it.
struct RangeKeyTile {
  SeenKeys keys;
  int32_t first_row;  // rows [first_row, end_row) see some of them
  int32_t end_row;

  template <int kKeys>
  static __device__ RangeKeyTile of(const RangeBackwardParams& params, int64_t slot) {
    const SeenKeys keys = seen_keys<kKeys>(params, slot);
    return {keys, keys.first_query * params.sequences.group, keys.end_query * params.sequences.group};
  }
  __device__ int32_t splits(const RangeBackwardParams& params) const {
    const int64_t needed = ceil_div(end_row - first_row, params.rows_per_split);
    return static_cast<int32_t>(needed < 1 ? 1 : needed);
  }
  template <typename Element>
  __device__ KeyGradientRows gradients(const RangeBackwardParams& params, int32_t head_kv) const {
    return KeyGradientRows::of<Element>(params, keys.place.batch, keys.begin + keys.first_key, head_kv, keys.count);
  }
};

// To the gradients, or where rows are split to this split's partial sums.
template <typename Shape>
__device__ inline void store_tile(const RangeBackwardParams& params, const RangeKeyTile& tile,
                                  const KeyGradients<Shape>& sums) {
  const unsigned heads = static_cast<unsigned>(params.sequences.heads_kv);
  const int part = static_cast<int>(blockIdx.x % Shape::kParts);
  if (tile.splits(params) > 1) {
    store_partial<Shape>(partial_sums<Shape>(params.partials, blockIdx.x / Shape::kParts), part, sums, params.scale);
    return;
  }
  const int32_t head_kv =
      static_cast<int32_t>(blockIdx.x / Shape::kParts / static_cast<unsigned>(params.splits) % heads);
  store_key_gradients<Shape>(tile.gradients<typename Shape::Element>(params, head_kv), part, sums, params.scale);
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    range_backward_keys_sm80(const __grid_constant__ RangeBackwardParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const SequenceLayout& s = params.sequences;
  // The earliest keys are seen by the most rows: they go first.
  unsigned block = blockIdx.x;
  const int part = static_cast<int>(block % Shape::kParts);
  block /= Shape::kParts;
  const int32_t split = static_cast<int32_t>(block % static_cast<unsigned>(params.splits));
  block /= static_cast<unsigned>(params.splits);
  const int32_t head_kv = static_cast<int32_t>(block % static_cast<unsigned>(s.heads_kv));
  const RangeKeyTile tile = RangeKeyTile::of<Shape::kKeys>(params, block / static_cast<unsigned>(s.heads_kv));
  const int32_t splits = tile.splits(params);
  if (tile.keys.count == 0 || split >= splits) {
    return;
  }
  // Kept for the end in shared memory: in the loop every register counts.
  __shared__ RangeKeyTile kept_tile;
  if (threadIdx.x == 0) {
    kept_tile = tile;
  }
  const SequencePlace& place = tile.keys.place;
  const int32_t begin = tile.first_row + split * params.rows_per_split;
  const int32_t end = min(tile.end_row, begin + params.rows_per_split);
  KeyGradients<Shape> sums;
  sum_key_gradients<Shape>(sums,
                           KeyTile::of<typename Shape::Element>(params, place, tile.keys.begin, tile.keys.first_key,
                                                                tile.keys.count, head_kv),
                           RowTensors(params), params.visibility, params.scale, begin, end, part, shared,
                           [&](int32_t row) -> PlacedRow {
                             const Row at = row_at(s, head_kv, row);
                             return {static_cast<int32_t>(place.q_begin) + at.query, at.head};
                           });
  __syncthreads();
  store_tile<Shape>(params, kept_tile, sums);
}

// One block of threads for each key tile and KV head.
template <typename Shape>
__global__ void __launch_bounds__(256) range_add_partials_sm80(const __grid_constant__ RangeBackwardParams params) {
  const unsigned heads = static_cast<unsigned>(params.sequences.heads_kv);
  const int32_t head_kv = static_cast<int32_t>(blockIdx.x % heads);
  const RangeKeyTile tile = RangeKeyTile::of<Shape::kKeys>(params, blockIdx.x / heads);
  const int32_t splits = tile.splits(params);
  if (tile.keys.count == 0 || splits <= 1) {
    return;
  }
  const float* const partials = partial_sums<Shape>(params.partials, int64_t{blockIdx.x} * params.splits);
  add_partials<Shape>(partials, splits, tile.gradients<typename Shape::Element>(params, head_kv));
}

}  // namespace nsa
