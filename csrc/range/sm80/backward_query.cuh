// Attention over a range of keys, backward: the gradient of q. As the forward, a block of threads holds a tile of rows
// and walks their keys, two buffers deep.
#pragma once

#include "common/row_gradient.cuh"
#include "range/sm80/row_tile.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV, int kWarps, int kRowTiles, int kKeys, int kStages_>
struct RangeBackwardQueryShape : RangeRowTileShape<Element, kDimK, kDimV, kWarps, kRowTiles, kKeys> {
  static constexpr int kStages = kStages_;
};

// The shared memory: the tile of rows, then the stages of keys.
template <typename Shape>
struct RangeBackwardQueryTiles {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  typename Shape::QTile q;
  typename Shape::OutTile grad_out;
  Element* stages;

  __device__ explicit RangeBackwardQueryTiles(unsigned char* shared)
      : q{reinterpret_cast<Element*>(shared)}, grad_out{q.data + q.kSize}, stages(grad_out.data + grad_out.kSize) {}
  __device__ KTile k(int stage) const { return {stages + stage * (KTile::kSize + VTile::kSize)}; }
  __device__ VTile v(int stage) const { return {k(stage).data + KTile::kSize}; }
};

// One warp's rows.
template <typename Shape>
struct RangeBackwardQueryRows {
  using Element = typename Shape::Element;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kKeys = Shape::kKeys;
  using Scores = float[kRowTiles][kKeys / 8][4];

  float scale_log2;
  float lse_log2[kRowTiles][2];
  RowGradient of_row[kRowTiles][2];
  float grad_q[kRowTiles][Shape::kDimK / 8][4];

  __device__ RangeBackwardQueryRows(const RangeBackwardParams& params, const RangeRowTile& tile)
      : scale_log2(params.scale * kLog2E) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(tile.first_row + row_of(r, half), tile.last_row);
        const Row at = row_at(tile.layout, tile.head_kv, row);
        of_row[r][half] = RowGradient(params, tile.place.batch, at.head, tile.place.q_begin + at.query);
        lse_log2[r][half] = of_row[r][half].lse * kLog2E;
      }
      clear(grad_q[r]);
    }
  }
  static __device__ int row_of(int r, int half) { return Shape::warp_row() + 16 * r + 8 * half + this_lane() / 4; }

  // Scores to probabilities.
  __device__ void weigh(Scores& scores, const RangeRowTile& tile, const KeysSeen& keys, int32_t key) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (keys.template cut<kKeys>(key)) {
        keys.mask(scores[r], tile, row_of(r, 0), key, this_lane());
      }
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float score = scores[r][i][j];
          scores[r][i][j] = score == kMinusInfinity ? 0.f : exp2_approx(fmaf(score, scale_log2, -lse_log2[r][j / 2]));
        }
      }
    }
  }

  // Probabilities, and <dO, v>, to gradients of the scores.
  __device__ void grad_scores(Scores& scores, const Scores& grads) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          scores[r][i][j] = of_row[r][j / 2].template grad_score<Element>(scores[r][i][j], grads[r][i][j]);
        }
      }
    }
  }

  __device__ void store(const RangeBackwardParams& params, const RangeRowTile& tile, const typename Shape::QTile& to) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_row<Element>(to, row_of(r, half), grad_q[r], half, params.scale, this_lane());
      }
    }
    __syncwarp();
    tile.write_rows<16 * kRowTiles>(params.grad_q, to, Shape::warp_row(), params.add_to_grad_q, this_lane());
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    range_backward_query_sm80(const __grid_constant__ RangeBackwardParams params) {
  constexpr int kKeys = Shape::kKeys;
  constexpr int kStages = Shape::kStages;
  extern __shared__ __align__(128) unsigned char shared[];
  const RangeBackwardQueryTiles<Shape> tiles(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = this_lane();
  const RangeRowTile tile = RangeRowTile::of_block<Shape::kRows>(params.sequences);
  if (tile.empty()) {
    return;
  }
  const KeysSeen keys = KeysSeen::by(tile, params);
  const auto copy_keys = [&](int stage, int32_t key) {
    keys.copy_keys<Shape::kThreads>(tiles.k(stage), params.k, tile, key, thread);
    keys.copy_keys<Shape::kThreads>(tiles.v(stage), params.v, tile, key, thread);
  };
  tile.copy_rows<Shape::kThreads>(tiles.q, params.q, thread);
  tile.copy_rows<Shape::kThreads>(tiles.grad_out, params.grad_out, thread);
  commit_copies();  // also where no key follows: what is not committed is not waited for
#pragma unroll
  for (int stage = 0; stage + 1 < kStages; ++stage) {
    if (keys.begin + stage * kKeys < keys.end) {
      copy_keys(stage, keys.begin + stage * kKeys);
    }
    commit_copies();
  }

  RangeBackwardQueryRows<Shape> rows(params, tile);
  int stage = 0;
  for (int32_t key = keys.begin; key < keys.end; key += kKeys) {
    if constexpr (kStages == 1) {
      __syncthreads();
      copy_keys(0, key);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
    } else {
      wait_copies<kStages - 2>();
      __syncthreads();
      const int32_t ahead = key + (kStages - 1) * kKeys;
      if (ahead < keys.end) {
        copy_keys((stage + kStages - 1) % kStages, ahead);
      }
      commit_copies();
    }
    typename RangeBackwardQueryRows<Shape>::Scores scores;
    multiply_transposed(scores, tiles.q, Shape::warp_row(), tiles.k(stage), lane);
    rows.weigh(scores, tile, keys, key);
    typename RangeBackwardQueryRows<Shape>::Scores grads;
    multiply_transposed(grads, tiles.grad_out, Shape::warp_row(), tiles.v(stage), lane);
    rows.grad_scores(scores, grads);
    accumulate(rows.grad_q, scores, tiles.k(stage), 0, lane);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();
  rows.store(params, tile, tiles.q);
}

}  // namespace nsa
