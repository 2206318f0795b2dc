// Attention over a range of keys, forward. A block of threads holds a tile of rows (common/rows.cuh), walks the keys
// that any of them sees, and keeps a running softmax. K and V have one buffer each: V of a step arrives while the
// scores are computed, K of the next while the values are summed.
#pragma once

#include "common/keys.cuh"
#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sm80/tile.cuh"
#include "common/softmax.cuh"
#include "range/params.h"

namespace nsa {

// kRowTiles: times 16 rows of each warp. Every right operand is used that often, so two are nearly twice as fast as
// one.
template <typename Element_, int kDimK_, int kDimV_, int kWarps_, int kRowTiles_, int kKeys_>
struct RangeForwardShape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kSharedBytes = sizeof(Element) * (kRows * kDimK + kKeys * (kDimK + kDimV));
  static_assert(kDimV <= kDimK, "the output is staged where the queries were");
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    range_forward_sm80(const __grid_constant__ RangeForwardParams params) {
  using Element = typename Shape::Element;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kRowTiles = Shape::kRowTiles;
  extern __shared__ __align__(128) unsigned char shared[];
  const SharedTile<Element, Shape::kRows, Shape::kDimK> q_tile{reinterpret_cast<Element*>(shared)};
  const SharedTile<Element, kKeys, Shape::kDimK> k_tile{q_tile.data + q_tile.kSize};
  const SharedTile<Element, kKeys, Shape::kDimV> v_tile{k_tile.data + k_tile.kSize};
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_row = thread / 32 * (16 * kRowTiles);

  // The latest queries see the most keys: they go first.
  const SequenceLayout& s = params.sequences;
  const int64_t slots = gridDim.x / static_cast<unsigned>(s.heads_kv);
  const int32_t head_kv = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(s.heads_kv));
  const int64_t slot = slots - 1 - blockIdx.x / static_cast<unsigned>(s.heads_kv);
  const Tile tile = find_tile(s, s.cumulative_q, s.group, s.length_q * s.group, Shape::kRows, slot);
  // Kept for the end in shared memory: in the loop every register counts.
  __shared__ SequencePlace kept_place;
  const SequencePlace place = place_of(s, tile.sequence);
  if (thread == 0) {
    kept_place = place;
  }
  const int32_t rows = place.q_length * s.group;
  const int32_t first_row = tile.index * Shape::kRows;
  if (first_row >= rows) {
    return;
  }
  const int32_t last_row = min(first_row + Shape::kRows, rows) - 1;
  const KeysPlace keys = keys_of(place, params.visibility, params.compressed);
  const int32_t first_position = place.offset + row_at(s, head_kv, first_row).query;
  const int32_t last_position = place.offset + row_at(s, head_kv, last_row).query;
  const int32_t begin = params.visibility.begin(first_position);
  const int32_t end = min(params.visibility.end(last_position), keys.length);
  // Keys in [all_begin, all_end) are seen by every row.
  const int32_t all_begin = params.visibility.begin(last_position);
  const int32_t all_end = min(params.visibility.end(first_position), keys.length);

  const auto copy_keys = [&](const auto& to, const TensorView& from, int32_t first_key) {
    const int64_t first = keys.begin + first_key;
    to.template copy_consecutive<Shape::kThreads>(from.row<Element>(place.batch, first, head_kv), from.token_stride,
                                                  end - first_key, from.width, thread);
    commit_copies();
  };
  q_tile.copy_rows(params.q.width, params.q.data, thread, Shape::kThreads, [&](int row) -> const Element* {
    if (first_row + row > last_row) {
      return nullptr;
    }
    const Row at = row_at(s, head_kv, first_row + row);
    return params.q.row<Element>(place.batch, place.q_begin + at.query, at.head);
  });
  copy_keys(k_tile, params.k, begin);

  const float sign = params.scale < 0.f ? -1.f : 1.f;
  const float scale_log2 = params.scale * sign * kLog2E;
  RunningSoftmax<kRowTiles> softmax;
  float out[kRowTiles][Shape::kDimV / 8][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    clear(out[r]);
  }

  for (int32_t key = begin; key < end; key += kKeys) {
    wait_copies<0>();
    __syncthreads();
    copy_keys(v_tile, params.v, key);

    float scores[kRowTiles][kKeys / 8][4];
    multiply_transposed(scores, q_tile, warp_row, k_tile, lane);
    wait_copies<0>();
    __syncthreads();
    if (key + kKeys < end) {
      copy_keys(k_tile, params.k, key + kKeys);
    }

    if (sign < 0.f) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        negate(scores[r]);
      }
    }
    if (key < all_begin || key + kKeys > all_end) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t row = first_row + warp_row + 16 * r + 8 * half + lane / 4;
          const int32_t position = place.offset + row_at(s, head_kv, row).query;
          const int32_t low = params.visibility.begin(position) - key;
          const int32_t high = min(params.visibility.end(position), keys.length) - key;
          keep_range(scores[r], half, low, high, lane);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      softmax.step(r, scores[r], out[r], scale_log2);
    }
    accumulate(out, scores, v_tile, 0, lane);
  }

  // The output goes through shared memory, where the queries were, to leave in 16-byte stores.
  wait_copies<0>();
  __syncthreads();
  const SequencePlace at_end = kept_place;
  const SharedTile<Element, Shape::kRows, Shape::kDimV> out_tile{q_tile.data};
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * r + 8 * half + lane / 4;
      const SoftmaxResult result = softmax.finish(r, half, scale_log2);
      store_row<Element>(out_tile, row, out[r], half, result.factor, lane);
      if (lane % 4 == 0 && first_row + row <= last_row) {
        const Row at = row_at(s, head_kv, first_row + row);
        params.lse.at(at_end.batch, at.head, at_end.q_begin + at.query) = result.lse;
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = Shape::kDimV / kChunk;
#pragma unroll 4
  for (int i = lane; i < 16 * kRowTiles * kChunks; i += 32) {
    const int row = warp_row + i / kChunks;
    const int index = i % kChunks;
    if (first_row + row <= last_row && index * kChunk < params.out.width) {
      const Row at = row_at(s, head_kv, first_row + row);
      Element* to = params.out.row<Element>(at_end.batch, at_end.q_begin + at.query, at.head) + index * kChunk;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(out_tile.chunk(row, index));
    }
  }
}

}  // namespace nsa
