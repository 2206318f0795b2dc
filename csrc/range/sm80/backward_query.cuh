// Attention over a range of keys, backward: the gradient of q. As the forward, a block of threads holds a tile of rows
// and walks their keys, two buffers deep.
#pragma once

#include "common/keys.cuh"
#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sm80/tile.cuh"
#include "common/softmax.cuh"
#include "range/params.h"

namespace nsa {

template <typename Element_, int kDimK_, int kDimV_, int kWarps_, int kRowTiles_, int kKeys_, int kStages_>
struct RangeBackwardQueryShape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kSharedBytes = sizeof(Element) * (kRows + kStages * kKeys) * (kDimK + kDimV);
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    range_backward_query_sm80(const __grid_constant__ RangeBackwardParams params) {
  using Element = typename Shape::Element;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kRowTiles = Shape::kRowTiles;
  using QTile = SharedTile<Element, Shape::kRows, Shape::kDimK>;
  using GradOutTile = SharedTile<Element, Shape::kRows, Shape::kDimV>;
  using KTile = SharedTile<Element, kKeys, Shape::kDimK>;
  using VTile = SharedTile<Element, kKeys, Shape::kDimV>;
  extern __shared__ __align__(128) unsigned char shared[];
  const QTile q_tile{reinterpret_cast<Element*>(shared)};
  const GradOutTile grad_out_tile{q_tile.data + q_tile.kSize};
  Element* const stages = grad_out_tile.data + grad_out_tile.kSize;
  const auto k_tile = [&](int stage) { return KTile{stages + stage * (KTile::kSize + VTile::kSize)}; };
  const auto v_tile = [&](int stage) { return VTile{k_tile(stage).data + KTile::kSize}; };
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_row = thread / 32 * (16 * kRowTiles);

  const SequenceLayout& s = params.sequences;
  const int64_t slots = gridDim.x / static_cast<unsigned>(s.heads_kv);
  const int32_t head_kv = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(s.heads_kv));
  const int64_t slot = slots - 1 - blockIdx.x / static_cast<unsigned>(s.heads_kv);
  const Tile tile = find_tile(s, s.cumulative_q, s.group, s.length_q * s.group, Shape::kRows, slot);
  const SequencePlace place = place_of(s, tile.sequence);
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
  const int32_t all_begin = params.visibility.begin(last_position);
  const int32_t all_end = min(params.visibility.end(first_position), keys.length);

  const auto copy_keys = [&](int stage, int32_t key) {
    const int64_t first = keys.begin + key;
    k_tile(stage).template copy_consecutive<Shape::kThreads>(params.k.row<Element>(place.batch, first, head_kv),
                                                             params.k.token_stride, end - key, params.k.width, thread);
    v_tile(stage).template copy_consecutive<Shape::kThreads>(params.v.row<Element>(place.batch, first, head_kv),
                                                             params.v.token_stride, end - key, params.v.width, thread);
  };
  const auto copy_rows = [&](const auto& to, const TensorView& from) {
    to.copy_rows(from.width, from.data, thread, Shape::kThreads, [&](int row) -> const Element* {
      if (first_row + row > last_row) {
        return nullptr;
      }
      const Row at = row_at(s, head_kv, first_row + row);
      return from.row<Element>(place.batch, place.q_begin + at.query, at.head);
    });
  };
  copy_rows(q_tile, params.q);
  copy_rows(grad_out_tile, params.grad_out);
  commit_copies();  // also where no key follows: what is not committed is not waited for
#pragma unroll
  for (int stage = 0; stage + 1 < Shape::kStages; ++stage) {
    if (begin + stage * kKeys < end) {
      copy_keys(stage, begin + stage * kKeys);
    }
    commit_copies();
  }

  // Of the lane's rows: what turns scores into probabilities, and those into gradients.
  float lse[kRowTiles][2];
  float delta[kRowTiles][2];
  float gate[kRowTiles][2];
  float grad_lse[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = min(first_row + warp_row + 16 * r + 8 * half + lane / 4, last_row);
      const Row at = row_at(s, head_kv, row);
      const int64_t token = place.q_begin + at.query;
      lse[r][half] = params.lse.at(place.batch, at.head, token) * kLog2E;
      delta[r][half] = params.delta.at(place.batch, at.head, token);
      gate[r][half] = params.gate.data == nullptr ? 1.f : params.gate.at(place.batch, at.head, token);
      grad_lse[r][half] = params.grad_lse.data == nullptr ? 0.f : params.grad_lse.at(place.batch, at.head, token);
    }
  }
  const float scale_log2 = params.scale * kLog2E;
  float grad_q[kRowTiles][Shape::kDimK / 8][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    clear(grad_q[r]);
  }

  int stage = 0;
  for (int32_t key = begin; key < end; key += kKeys) {
    if constexpr (Shape::kStages == 1) {
      __syncthreads();
      copy_keys(0, key);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
    } else {
      wait_copies<Shape::kStages - 2>();
      __syncthreads();
      const int32_t ahead = key + (Shape::kStages - 1) * kKeys;
      if (ahead < end) {
        copy_keys((stage + Shape::kStages - 1) % Shape::kStages, ahead);
      }
      commit_copies();
    }
    float scores[kRowTiles][kKeys / 8][4];
    multiply_transposed(scores, q_tile, warp_row, k_tile(stage), lane);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (key < all_begin || key + kKeys > all_end) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t row = first_row + warp_row + 16 * r + 8 * half + lane / 4;
          const int32_t position = place.offset + row_at(s, head_kv, row).query;
          const int32_t low = params.visibility.begin(position) - key;
          const int32_t high = min(params.visibility.end(position), keys.length) - key;
          keep_range(scores[r], half, low, high, lane);
        }
      }
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float score = scores[r][i][j];
          scores[r][i][j] = score == kMinusInfinity ? 0.f : exp2_approx(fmaf(score, scale_log2, -lse[r][j / 2]));
        }
      }
    }
    float grads[kRowTiles][kKeys / 8][4];
    multiply_transposed(grads, grad_out_tile, warp_row, v_tile(stage), lane);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float probability = scores[r][i][j];
          scores[r][i][j] = probability > kWholeProbability<Element>
                                ? grad_lse[r][j / 2]
                                : probability * gate[r][j / 2] * (grads[r][i][j] - delta[r][j / 2]);
        }
      }
    }
    accumulate(grad_q, scores, k_tile(stage), 0, lane);
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }

  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_row<Element>(q_tile, warp_row + 16 * r + 8 * half + lane / 4, grad_q[r], half, params.scale, lane);
    }
  }
  __syncwarp();
  constexpr int kChunks = Shape::kDimK / kChunk;
#pragma unroll 4
  for (int i = lane; i < 16 * kRowTiles * kChunks; i += 32) {
    const int row = warp_row + i / kChunks;
    const int index = i % kChunks;
    if (first_row + row <= last_row && index * kChunk < params.grad_q.width) {
      const Row at = row_at(s, head_kv, first_row + row);
      Element* to = params.grad_q.row<Element>(place.batch, place.q_begin + at.query, at.head) + index * kChunk;
      uint4 value = *reinterpret_cast<const uint4*>(q_tile.chunk(row, index));
      if (params.add_to_grad_q) {
        value = add_chunks<Element>(value, *reinterpret_cast<const uint4*>(to));
      }
      *reinterpret_cast<uint4*>(to) = value;
    }
  }
}

}  // namespace nsa
