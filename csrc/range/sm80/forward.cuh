// Attention over a range of keys, forward. A block of threads holds a tile of rows (common/rows.cuh), walks the keys
// that any of them sees, and keeps a running softmax. K and V have one buffer each: V of a step arrives while the
// scores are computed, K of the next while the values are summed.
#pragma once

#include "range/sm80/row_tile.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV, int kWarps, int kRowTiles, int kKeys>
struct RangeForwardShape : RangeRowTileShape<Element, kDimK, kDimV, kWarps, kRowTiles, kKeys> {
  static_assert(kDimV <= kDimK, "the output is staged where the queries were");
};

// One warp's rows.
template <typename Shape>
struct RangeForwardRows {
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kKeys = Shape::kKeys;
  using Scores = float[kRowTiles][kKeys / 8][4];

  float sign;
  float scale_log2;
  RunningSoftmax<kRowTiles> softmax;
  float out[kRowTiles][Shape::kDimV / 8][4];

  __device__ RangeForwardRows(float scale) : sign(scale < 0.f ? -1.f : 1.f) {
    scale_log2 = scale * sign * kLog2E;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      clear(out[r]);
    }
  }

  __device__ void mask(Scores& scores, const RangeRowTile& tile, const KeysSeen& keys, int32_t key) const {
    const int lane = this_lane();
    const int warp_row = Shape::warp_row();
    if (sign < 0.f) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        negate(scores[r]);
      }
    }
    if (keys.template cut<kKeys>(key)) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        keys.mask(scores[r], tile, warp_row + 16 * r + lane / 4, key, lane);
      }
    }
  }

  __device__ void add(Scores& scores, const typename Shape::VTile& v_tile) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      softmax.step(r, scores[r], out[r], scale_log2);
    }
    accumulate(out, scores, v_tile, 0, this_lane());
  }

  // The output goes through shared memory to leave in 16-byte stores.
  __device__ void store(const RangeForwardParams& params, const RangeRowTile& tile,
                        const typename Shape::OutTile& out_tile) {
    using Element = typename Shape::Element;
    const int lane = this_lane();
    const int warp_row = Shape::warp_row();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * r + 8 * half + lane / 4;
        const SoftmaxResult result = softmax.finish(r, half, scale_log2);
        store_row<Element>(out_tile, row, out[r], half, result.factor, lane);
        if (lane % 4 == 0 && tile.contains(row)) {
          const Row at = tile.at(row);
          params.lse.at(tile.place.batch, at.head, tile.place.q_begin + at.query) = result.lse;
        }
      }
    }
    __syncwarp();
    tile.write_rows<16 * kRowTiles>(params.out, out_tile, warp_row, false, lane);
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    range_forward_sm80(const __grid_constant__ RangeForwardParams params) {
  using Element = typename Shape::Element;
  constexpr int kKeys = Shape::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared)};
  const typename Shape::KTile k_tile{q_tile.data + q_tile.kSize};
  const typename Shape::VTile v_tile{k_tile.data + k_tile.kSize};
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = this_lane();
  const int warp_row = Shape::warp_row();

  RangeRowTile tile = RangeRowTile::of_block<Shape::kRows>(params.sequences);
  // Kept for the end in shared memory: in the loop every register counts.
  __shared__ SequencePlace kept_place;
  if (thread == 0) {
    kept_place = tile.place;
  }
  if (tile.empty()) {
    return;
  }
  const KeysSeen keys = KeysSeen::by(tile, params);
  const auto copy_keys = [&](const auto& to, const TensorView& from, int32_t key) {
    keys.copy_keys<Shape::kThreads>(to, from, tile, key, thread);
    commit_copies();
  };
  tile.copy_rows<Shape::kThreads>(q_tile, params.q, thread);
  copy_keys(k_tile, params.k, keys.begin);

  RangeForwardRows<Shape> rows(params.scale);
  for (int32_t key = keys.begin; key < keys.end; key += kKeys) {
    wait_copies<0>();
    __syncthreads();
    copy_keys(v_tile, params.v, key);

    typename RangeForwardRows<Shape>::Scores scores;
    multiply_transposed(scores, q_tile, warp_row, k_tile, lane);
    wait_copies<0>();
    __syncthreads();
    if (key + kKeys < keys.end) {
      copy_keys(k_tile, params.k, key + kKeys);
    }
    rows.mask(scores, tile, keys, key);
    rows.add(scores, v_tile);
  }

  wait_copies<0>();
  __syncthreads();
  tile.place = kept_place;
  rows.store(params, tile, {q_tile.data});
}

}  // namespace nsa
