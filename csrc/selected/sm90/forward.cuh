// Attention over listed blocks, forward, for Hopper: O_t = softmax(scale q_t K^T) V over the keys of token t's blocks.
//
// Every token's own reading of its blocks is bound by what leaves the L2 cache, so 12 consecutive tokens of one KV head
// (24 where a group has at most eight heads, 48 where it has at most four) form a tile that walks the union of their
// lists once: see union_walk.cuh. A warpgroup owns 64 rows of it, the heads of four, eight or sixteen tokens, and
// holds their sums in registers. It multiplies a block that several of its tokens chose with all its rows, by wgmma;
// rows of the others get weights of 0. A block that one or two warps' tokens alone chose is left to those warps, which
// hold the same rows and columns by mma.sync.
#pragma once

#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "selected/sm90/union_rows.cuh"
#include "selected/sm90/union_walk.cuh"

namespace nsa {

struct SelectedForwardSm90Params {
  SelectedForwardParams selected;
  UnionParams walk;
};

// The softmax and sums of a lane's two rows.
template <int kDimV>
struct RowSums {
  float maximum[2];
  float sum[2];
  float out[kDimV / 8][4];

  __device__ void reset() {
    maximum[0] = maximum[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.f;
    clear(out);
  }

  // Turns scores into exp(scale (score - maximum)). The maximum follows the scores only when one is more than kSlack
  // (of an exponent to base 2) above it, which is rare after the first blocks: most steps leave `out` as it is.
  template <int kTiles>
  __device__ void step(float (&scores)[kTiles][4], float scale_log2) {
    constexpr float kSlack = 8.f;
    float highest[2];
    bool higher = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
      for (int i = 1; i < kTiles; ++i) {
        highest[half] = fmaxf(highest[half], fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
      }
      highest[half] = fmaxf(row_max(highest[half]), maximum[half]);
      higher |= (highest[half] - maximum[half]) * scale_log2 > kSlack;
    }
    if (__any_sync(0xffffffffu, higher)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = highest[half] == kMinusInfinity ? 0.f : highest[half] * scale_log2;
        const float factor = exp2_approx(fmaf(maximum[half], scale_log2, -offset));
        maximum[half] = highest[half];
        sum[half] *= factor;
#pragma unroll
        for (int i = 0; i < kDimV / 8; ++i) {
          out[i][2 * half] *= factor;
          out[i][2 * half + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float offset = maximum[half] == kMinusInfinity ? 0.f : maximum[half] * scale_log2;
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[i][2 * half + j];
          score = exp2_approx(fmaf(score, scale_log2, -offset));
          total += score;
        }
      }
      sum[half] += total;
    }
  }
};

template <typename Shape>
__device__ inline void consume_forward(const SelectedForwardSm90Params& params, const UnionShared<Shape>& shared,
                                       int group, int warp) {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  const SelectedForwardParams& p = params.selected;
  const UnionParams& u = params.walk;
  const float scale_log2 = fabsf(p.scale) * kLog2E;
  const UnionRing<Shape> ring{shared};
  UnionQueries<Shape> q(shared, group, warp);
  RowSums<Shape::kDimV> sums;

  const auto begin = [&](const UnionTile&) { sums.reset(); };
  const auto take_rows = [&](uint32_t step) {
    const uint32_t loaded = q.take(ring.wait_k(step));
    ring.release_k(step, loaded);
  };

  // Scores become weights: none for what a row does not see.
  const auto weigh = [&](float (&scores)[8][4], const UnionStep& step, const UnionSeen& seen) {
    if (p.scale < 0.f) {
      negate(scores);
    }
    if (step.key + Shape::kKeys > seen.limit(0)) {
      const int lane = fresh_lane();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        keep_range(scores, half, 0, seen.limit(union_row<Shape>(u, warp, half, lane).token) - step.key, lane);
      }
    }
    if constexpr (Shape::kWide) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool chosen = chosen_row<Shape>(u, step.tokens, warp, half) != 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          scores[i][2 * half] = chosen ? scores[i][2 * half] : kMinusInfinity;
          scores[i][2 * half + 1] = chosen ? scores[i][2 * half + 1] : kMinusInfinity;
        }
      }
    }
    sums.step(scores, scale_log2);
  };

  const auto take_alone = [&](const UnionStep& step, const UnionSeen& seen) {
    float scores[8][4];
    q.multiply_alone(scores, ring.wait_k(step.number), 0);
    ring.release_k(step.number, mark_of(scores));
    weigh(scores, step, seen);
    const VTile v_tile = ring.wait_v(step.number);
    const int lane = fresh_lane();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      as_left<Element>(a, scores, i);
#pragma unroll
      for (int column = 0; column < Shape::kDimV; column += 16) {
        uint32_t b[4];
        v_tile.load_right(b, 16 * i, column, lane);
        multiply_add<Element>(sums.out[column / 8], a, b[0], b[1]);
        multiply_add<Element>(sums.out[column / 8 + 1], a, b[2], b[3]);
      }
    }
  };

  const auto take_together = [&](const UnionStep& step, const UnionSeen& seen) {
    float scores[8][4];
    q.start(scores, ring.wait_k(step.number));
    wait_products<0>();
    hold(scores);
    ring.release_k(step.number);
    const bool chosen = (step.tokens & tokens_of_warp(group_tokens_of<Shape>(u), warp)) != 0;
    if (chosen) {
      weigh(scores, step, seen);
    }
    uint32_t weights[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      as_left<Element>(weights[i], scores, i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weights[i][j] = chosen ? weights[i][j] : 0;
      }
    }
    const VTile v_tile = ring.wait_v(step.number);
    if (step.key + Shape::kKeys > seen.k_length) {
      clear_rows(v_tile, max(seen.k_length - step.key, 0), 1 + group, static_cast<int>(threadIdx.x) % kWarpgroup);
    }
    const uint64_t v = tile_descriptor(v_tile.begin, VTile::kPanelSize * 2);
    hold(sums.out);
    fence_products();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_async<Element>(sums.out, weights[i], advance(v, 2 * 64 * 16 * i), true);
    }
    commit_products();
    wait_products<0>();
    hold(sums.out);
  };

  const auto take = [&](const UnionStep& step, const UnionSeen& seen) {
    if (step.alone) {
      take_alone(step, seen);
    } else {
      take_together(step, seen);
    }
    ring.release_v(step.number);
  };

  const auto end = [&](const UnionTile& tile) {
    const int lane = fresh_lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const UnionRow row = union_row<Shape>(u, warp, half, lane);
      const int32_t query = tile.first_query + group * group_tokens_of<Shape>(u) + row.token;
      const float total = row_sum(sums.sum[half]);
      const bool empty = sums.maximum[half] == kMinusInfinity;
      Element* to = nullptr;
      if (query < tile.place.q_length && row.head < tile.heads) {
        const int64_t token = tile.place.q_begin + query;
        to = p.out.row<Element>(tile.place.batch, token, tile.first_head + row.head);
        if (lane % 4 == 0) {
          p.lse.at(tile.place.batch, tile.first_head + row.head, token) =
              empty ? kMinusInfinity : (sums.maximum[half] * scale_log2 + log2f(total)) * kLn2;
        }
      }
      write_row(to, p.out.width, sums.out, half, empty ? 0.f : 1.f / total, false, lane);
    }
  };
  consume_unions(u, shared, group, warp, begin, take_rows, take, end);
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    selected_forward_sm90(const __grid_constant__ SelectedForwardSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_unions<Shape>(params.walk, [&](const UnionShared<Shape>& shared, int group, int warp) {
    consume_forward(params, shared, group, warp);
  });
#endif
}

}  // namespace nsa
