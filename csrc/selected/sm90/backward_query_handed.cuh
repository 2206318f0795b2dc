// Attention over listed blocks, backward, for Hopper: the gradient of q, from the gradients of scores that the kernel
// of the gradients of k and v handed over.
//   dq = scale dS K
//
// The forward's tiles and walk (union_walk.cuh), without values and rows of Q: shared memory is one ring of K. A
// warpgroup's 64 rows of dq stay in registers; a warp loads its tokens' dS of a block as it lies, as left operands. A
// block that several of its tokens chose is taken by all of its warps, by wgmma; others by the tokens' warps, by
// mma.sync.
#pragma once

#include "common/sm80/tile.cuh"
#include "selected/sm90/union_walk.cuh"

namespace nsa {

struct SelectedQueryHandedSm90Params {
  SelectedBackwardParams selected;
  UnionParams walk;
  int32_t block_units;  // of HandedScores, for the group
  int32_t key_units;
};

template <typename Element_, int kDimK_, int kGroups_, int kStages_, bool kWide_, int kMostAlone_>
struct HandedShape : UnionShape<Element_, kDimK_, 64, false, kGroups_, kStages_, 1, kWide_, kMostAlone_> {
  static constexpr bool kOnlyKeys = true;
  static constexpr int kProducerRegisters = kGroups_ != 4 ? 56 : kDimK_ == 128 ? 32 : 64;
  static constexpr int kConsumerRegisters = kGroups_ != 4 ? 152 : kDimK_ == 128 ? 112 : 104;
  static constexpr int kRingBytes = kStages_ * PanelTile<Element_, 64, kDimK_>::kSize * 2;
  static constexpr int kGroupBytes = 0;
};

template <typename Shape>
__device__ inline void consume_handed(const SelectedQueryHandedSm90Params& params, const UnionShared<Shape>& shared,
                                      int group, int warp) {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using Parts = GradientParts<Shape::kDimK>;
  const SelectedBackwardParams& p = params.selected;
  const UnionParams& u = params.walk;
  const UnionRing<Shape> ring{shared};
  GradientSums<Shape::kDimK> grad;
  // Where dS of the next block of the lane's rows lies, in units of 32 bytes. Where a token has 16 rows, the second is
  // eight heads further. (What lies there of heads that do not exist may be anything: nobody stores what becomes of
  // it.)
  constexpr int kTokens = Shape::kHeadSlots == 16 ? 1 : 2;
  int32_t from[kTokens];

  const auto begin = [&](const UnionTile& tile) {
    const int lane = fresh_lane();
    const int32_t first_token = group * group_tokens_of<Shape>(u);
#pragma unroll
    for (int half = 0; half < kTokens; ++half) {
      const UnionRow row = union_row<Shape>(u, warp, half, lane);
      const int64_t query =
          tile.place.batch * u.sequences.length_q + tile.place.q_begin + tile.first_query + first_token + row.token;
      const int64_t list = (tile.head_kv - p.handed.first_head) * p.handed.queries + query;
      const int32_t head = tile.first_head + row.head - tile.head_kv * u.sequences.group;
      from[half] = static_cast<int32_t>(list * u.num_selected * params.block_units) + HandedScores::head_units(head);
    }
#pragma unroll
    for (int i = 0; i < Parts::kCount; ++i) {
      clear(grad[i]);
    }
  };

  // dS of the warp's rows and a block that `tokens` chose.
  const auto load = [&](uint32_t (&scores)[4][4], uint32_t tokens) {
    const int warp = fresh_thread() % kWarpgroup / 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool chosen = chosen_row<Shape>(u, tokens, warp, half) != 0;
      const int32_t units = kTokens == 2 ? from[half % kTokens] : from[0] + half * HandedScores::head_units(8);
      const uint2* const at = static_cast<const uint2*>(p.handed.data) + int64_t{units} * 4 + fresh_lane() % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint2 keys = chosen ? __ldcs(at + 4 * params.key_units * i) : uint2{};
        scores[i][half] = keys.x;
        scores[i][half + 2] = keys.y;
      }
    }
#pragma unroll
    for (int half = 0; half < kTokens; ++half) {
      from[half] += chosen_row<Shape>(u, tokens, warp, half) & params.block_units;
    }
  };

  const auto take = [&](const UnionStep& step, const UnionSeen& seen) {
    uint32_t scores[4][4];
    load(scores, step.tokens);
    const KTile k_tile = ring.wait_k(step.number);
    if (step.alone) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        add_products_alone<Shape::kDimK>(grad, scores[i], k_tile, 16 * i, fresh_lane());
      }
    } else {
      if (step.key + Shape::kKeys > seen.k_length) {
        clear_rows(k_tile, max(seen.k_length - step.key, 0), 1 + group, fresh_thread() % kWarpgroup);
      }
      add_products_together<Shape::kDimK>(grad, scores, k_tile);
    }
    ring.release_k(step.number);
  };

  const auto end = [&](const UnionTile& tile) { write_query_gradients<Shape, false>(p, u, tile, grad, group, warp); };
  consume_unions(u, shared, group, warp, begin, [](uint32_t) {}, take, end);
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    selected_query_handed_sm90(const __grid_constant__ SelectedQueryHandedSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_unions<Shape>(params.walk, [&](const UnionShared<Shape>& shared, int group, int warp) {
    consume_handed(params, shared, group, warp);
  });
#endif
}

}  // namespace nsa
