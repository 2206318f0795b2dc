// Attention over listed blocks, backward: the gradients of k and v. A block of threads holds a tile of keys of one
// block and one KV head, and gathers the queries that chose it, or one segment of them (ChosenBy).
#pragma once

#include "common/sm80/key_gradients.cuh"
#include "selected/params.h"

namespace nsa {

// The block `id` of ChosenBy: its sequence, KV head and keys.
struct SelectedKeyTile {
  SequencePlace place;
  int32_t head_kv;
  int32_t first_key;  // of tile `tile` of the block
  int32_t count;
};

template <int kKeys>
__device__ inline SelectedKeyTile selected_key_tile(const SelectedBackwardParams& params, int64_t id, int32_t tile) {
  const SequenceLayout& s = params.sequences;
  const int64_t slots = params.chosen_by.blocks / s.heads_kv;
  const Tile block = find_tile(s, s.cumulative_k, 1, s.length_k, params.select_size, id % slots);
  SelectedKeyTile result;
  result.place = place_of(s, block.sequence);
  result.head_kv = static_cast<int32_t>(id / slots);
  const int64_t first = int64_t{block.index} * params.select_size;
  const int64_t end = min_of(first + params.select_size, result.place.k_length);
  result.first_key = static_cast<int32_t>(min_of(first + int64_t{tile} * kKeys, 0x7fffffff));
  result.count = static_cast<int32_t>(max_of(min_of(end - result.first_key, kKeys), 0));
  return result;
}

// The last block whose segments begin at or before `segment`.
__device__ inline int64_t block_of_segment(const ChosenBy& chosen_by, int64_t segment) {
  int64_t low = 0;
  int64_t high = chosen_by.blocks - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (chosen_by.segments[middle] <= segment) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// To the gradients, or where a block has several segments to this one's partial sums.
template <typename Shape>
__device__ inline void store_tile(const SelectedBackwardParams& params, const SelectedKeyTile& tile, int64_t id,
                                  const KeyGradients<Shape>& sums) {
  using Element = typename Shape::Element;
  const ChosenBy& chosen_by = params.chosen_by;
  const unsigned tiles = static_cast<unsigned>(ceil_div(params.select_size, Shape::kKeys));
  const int part = static_cast<int>(blockIdx.x % Shape::kParts);
  const int32_t segments = chosen_by.segments[id + 1] - chosen_by.segments[id];
  if (segments > 1) {
    constexpr int kRowSize = Shape::kDimK + Shape::kDimV;
    const int64_t tile_index = blockIdx.x / Shape::kParts % tiles;
    const int64_t number = blockIdx.x / Shape::kParts / tiles - chosen_by.segments[id];
    const int64_t index = chosen_by.partials[id] * int64_t{tiles} + tile_index * segments + number;
    float* const to = params.partials + index * (Shape::kKeys * kRowSize);
    store_partial<kRowSize>(to, part * Shape::kOutK, sums.k, params.scale);
    store_partial<kRowSize>(to, Shape::kDimK + part * Shape::kOutV, sums.v, 1.f);
    return;
  }
  const int64_t first_key = tile.place.k_begin + tile.first_key;
  store_key_gradients<Element>(params.grad_k.row<Element>(tile.place.batch, first_key, tile.head_kv),
                               params.grad_k.token_stride, tile.count, params.grad_k.width, part * Shape::kOutK, sums.k,
                               params.scale);
  store_key_gradients<Element>(params.grad_v.row<Element>(tile.place.batch, first_key, tile.head_kv),
                               params.grad_v.token_stride, tile.count, params.grad_v.width, part * Shape::kOutV, sums.v,
                               1.f);
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    selected_backward_keys_sm80(const __grid_constant__ SelectedBackwardParams params) {
  using Element = typename Shape::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  const SequenceLayout& s = params.sequences;
  const ChosenBy& chosen_by = params.chosen_by;
  const unsigned tiles = static_cast<unsigned>(ceil_div(params.select_size, Shape::kKeys));
  unsigned block = blockIdx.x;
  const int part = static_cast<int>(block % Shape::kParts);
  block /= Shape::kParts;
  const int32_t tile_index = static_cast<int32_t>(block % tiles);
  const int64_t segment = block / tiles;
  if (segment >= chosen_by.segments[chosen_by.blocks]) {
    return;
  }
  const int64_t id = block_of_segment(chosen_by, segment);
  const SelectedKeyTile tile = selected_key_tile<Shape::kKeys>(params, id, tile_index);
  if (tile.count == 0) {
    return;
  }
  // Kept for the end in shared memory: in the loop every register counts.
  __shared__ SelectedKeyTile kept_tile;
  __shared__ int64_t kept_id;
  if (threadIdx.x == 0) {
    kept_tile = tile;
    kept_id = id;
  }
  const SequencePlace& place = tile.place;
  const int32_t number = static_cast<int32_t>(segment - chosen_by.segments[id]);
  const int32_t queries = chosen_by.begins[id + 1] - chosen_by.begins[id];
  const int32_t first = number * chosen_by.segment;
  const int32_t count = min(queries - first, chosen_by.segment);
  const int32_t* const list = chosen_by.queries + chosen_by.begins[id] + first;
  // Queries are numbered through the batch.
  const int32_t to_token = static_cast<int32_t>(-place.batch * s.length_q);
  const int64_t first_key = place.k_begin + tile.first_key;
  KeyGradients<Shape> sums;
  sum_key_gradients<Shape>(
      sums,
      {params.k.row<Element>(place.batch, first_key, tile.head_kv),
       params.v.row<Element>(place.batch, first_key, tile.head_kv), params.k.token_stride, params.v.token_stride,
       tile.first_key, tile.count, place.batch, static_cast<int32_t>(place.offset - place.q_begin)},
      {params.q, params.grad_out, params.lse, params.delta, params.gate, params.grad_lse},
      {.stride = 1, .first_seen = 0, .window = Visibility::kNoWindow, .by_stride = Divisor()}, params.scale, 0,
      count * s.group, part, shared, [&](int32_t row) -> PlacedRow {
        const Row at = row_at(s, tile.head_kv, row);
        return {list[at.query] + to_token, at.head};
      });
  __syncthreads();
  store_tile<Shape>(params, kept_tile, kept_id, sums);
}
// One block of threads for each tile of each block.
template <typename Shape>
__global__ void __launch_bounds__(256)
    selected_add_partials_sm80(const __grid_constant__ SelectedBackwardParams params) {
  using Element = typename Shape::Element;
  const ChosenBy& chosen_by = params.chosen_by;
  const unsigned tiles = static_cast<unsigned>(ceil_div(params.select_size, Shape::kKeys));
  const int64_t id = blockIdx.x / tiles;
  const int32_t tile_index = static_cast<int32_t>(blockIdx.x % tiles);
  const int32_t segments = chosen_by.segments[id + 1] - chosen_by.segments[id];
  const SelectedKeyTile tile = selected_key_tile<Shape::kKeys>(params, id, tile_index);
  if (segments <= 1 || tile.count == 0) {
    return;
  }
  const int64_t first_key = tile.place.k_begin + tile.first_key;
  const float* const partials =
      params.partials + (chosen_by.partials[id] * int64_t{tiles} + tile_index * int64_t{segments}) *
                            (Shape::kKeys * (Shape::kDimK + Shape::kDimV));
  add_partials<Shape>(partials, segments, params.grad_k.row<Element>(tile.place.batch, first_key, tile.head_kv),
                      params.grad_k.token_stride, params.grad_k.width,
                      params.grad_v.row<Element>(tile.place.batch, first_key, tile.head_kv), params.grad_v.token_stride,
                      params.grad_v.width, tile.count);
}

}  // namespace nsa
