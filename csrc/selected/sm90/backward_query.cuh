// Attention over listed blocks, backward, for Hopper: the gradient of q.
//   P = exp(scale q K^T - lse), dS = P (dO V^T - delta), dq = scale gate dS K
//
// The forward's tiles and walk: see union_walk.cuh. A warpgroup's 64 rows of dq stay in registers. For each block
// that several of its tokens chose it starts Q K^T and dO V^T together, turns them into dS, which stays in registers,
// and adds dS K; rows of tokens that did not choose the block have dS = 0. A block that one token chose is left to that
// token's warp, which holds the same rows and columns by mma.sync.
#pragma once

#include "common/scores.cuh"
#include "selected/sm90/union_walk.cuh"

namespace nsa {

struct SelectedBackwardQuerySm90Params {
  SelectedBackwardParams selected;
  UnionParams walk;
};

template <typename Shape>
__device__ inline void consume_backward_query(const SelectedBackwardQuerySm90Params& params,
                                              const UnionShared<Shape>& shared, int group, int warp) {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  using Parts = GradientParts<Shape::kDimK>;
  const SelectedBackwardParams& p = params.selected;
  const UnionParams& u = params.walk;
  const float scale_log2 = p.scale * kLog2E;
  const UnionRing<Shape> ring{shared};

  // Of the lane's rows.
  float lse[2];
  float delta[2];
  GradientSums<Shape::kDimK> grad;

  const auto row_grad_lse = [&](int half, int lane) -> float& {
    return shared.barriers->grad_lse[fresh_thread() / 32 * 16 + 8 * half + lane / 4];
  };

  const auto begin = [&](const UnionTile& tile) {
    const int lane = fresh_lane();
    const int32_t first_token = group * group_tokens_of<Shape>(u);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const UnionRow row = union_row<Shape>(u, warp, half, lane);
      const int32_t query = tile.first_query + first_token + row.token;
      const bool exists = query < tile.place.q_length && row.head < tile.heads;
      const int32_t head = tile.first_head + row.head;
      const int64_t token = tile.place.q_begin + query;
      lse[half] = exists ? p.lse.at(tile.place.batch, head, token) * kLog2E : 0.f;
      delta[half] = exists ? p.delta.at(tile.place.batch, head, token) : 0.f;
      if (lane % 4 == 0) {
        const float gate = exists && p.gate.data != nullptr ? p.gate.at(tile.place.batch, head, token) : 1.f;
        const float grad_lse =
            exists && p.grad_lse.data != nullptr ? p.grad_lse.at(tile.place.batch, head, token) : 0.f;
        row_grad_lse(half, lane) = grad_lse == 0.f ? 0.f : grad_lse / gate;
      }
    }
#pragma unroll
    for (int i = 0; i < Parts::kCount; ++i) {
      clear(grad[i]);
    }
    __syncwarp();
  };

  // Scores become probabilities. Returns whether a row that chose the block may have one key with all of it.
  const auto weigh = [&]<int kTiles>(float (&scores)[kTiles][4], uint32_t tokens) {
    float highest[2] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = exp2_approx(fmaf(scores[i][j], scale_log2, -lse[j / 2]));
        highest[j / 2] = fmaxf(highest[j / 2], scores[i][j]);
      }
    }
    const uint32_t rows[2] = {chosen_row<Shape>(u, tokens, warp, 0), chosen_row<Shape>(u, tokens, warp, 1)};
    return __any_sync(0xffffffffu, (rows[0] != 0 && highest[0] > kWholeProbability<Element>) ||
                                       (rows[1] != 0 && highest[1] > kWholeProbability<Element>)) != 0;
  };
  // Probabilities become the gradients of scores.
  const auto differentiate = [&]<int kTiles>(float (&scores)[kTiles][4], const float (*grads)[4], bool whole) {
    if (whole) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float grad_lse = row_grad_lse(half, fresh_lane());
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            scores[i][j] =
                scores[i][j] > kWholeProbability<Element> ? grad_lse : scores[i][j] * (grads[i][j] - delta[half]);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          scores[i][j] *= grads[i][j] - delta[j / 2];
        }
      }
    }
  };
  // None where a row sees no key, whatever lies there.
  const auto mask = [&](float (&scores)[8][4], int32_t key, const UnionSeen& seen) {
    const int lane = fresh_lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t keys = seen.limit(union_row<Shape>(u, warp, half, lane).token) - key;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[i][2 * half + j];
          score = 8 * i + 2 * (lane % 4) + j < keys ? score : 0.f;
        }
      }
    }
  };

  UnionQueries<Shape> q(shared, group, warp);
  uint32_t grad_out[Shape::kDimV / 16][4];
  const auto take_rows = [&](uint32_t step) {
    uint32_t loaded = load_rows(grad_out, ring.wait_v(step), warp);
    ring.release_v(step, loaded);
    loaded = q.take(ring.wait_k(step));
    ring.release_k(step, loaded);
  };

  const auto take_alone = [&](const UnionStep& step) {
    const int lane = fresh_lane();
    float grads[8][4];
    multiply_rows_alone(grads, grad_out, ring.wait_v(step.number), 0);
    ring.release_v(step.number, mark_of(grads));
    const KTile k_tile = ring.wait_k(step.number);
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // of 32 keys: registers are few
      float scores[4][4];
      q.multiply_alone(scores, k_tile, 32 * part);
      const bool whole = weigh(scores, step.tokens);
      differentiate(scores, grads + 4 * part, whole);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
        as_left<Element>(a, scores, i);
        if constexpr (Shape::kWide) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            a[j] &= chosen_row<Shape>(u, step.tokens, warp, j % 2);
          }
        }
        add_products_alone<Shape::kDimK>(grad, a, k_tile, 32 * part + 16 * i, lane);
      }
    }
  };

  const auto take_together = [&](const UnionStep& step, const UnionSeen& seen) {
    float scores[8][4];
    float grads[8][4];
    const VTile v_tile = ring.wait_v(step.number);
    const KTile k_tile = ring.wait_k(step.number);
    if (step.key + Shape::kKeys > seen.k_length) {
      clear_rows(k_tile, max(seen.k_length - step.key, 0), 1 + group, fresh_thread() % kWarpgroup);
    }
    q.start(scores, k_tile);
    start_rows(grads, grad_out, v_tile);
    wait_products<1>();
    hold(scores);
    const bool whole = weigh(scores, step.tokens);
    wait_products<0>();
    hold(grads);
    ring.release_v(step.number);
    differentiate(scores, grads, whole);
    if (step.key + Shape::kKeys > seen.limit(0)) {
      mask(scores, step.key, seen);
    }
    uint32_t weights[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      as_left<Element>(weights[i], scores, i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weights[i][j] &= chosen_row<Shape>(u, step.tokens, warp, j % 2);
      }
    }
    add_products_together<Shape::kDimK>(grad, weights, k_tile);
  };

  const auto take = [&](const UnionStep& step, const UnionSeen& seen) {
    if (step.alone) {
      take_alone(step);
    } else {
      take_together(step, seen);
    }
    ring.release_k(step.number);
  };

  const auto end = [&](const UnionTile& tile) { write_query_gradients<Shape, true>(p, u, tile, grad, group, warp); };
  consume_unions(u, shared, group, warp, begin, take_rows, take, end);
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    selected_backward_query_sm90(const __grid_constant__ SelectedBackwardQuerySm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_unions<Shape>(params.walk, [&](const UnionShared<Shape>& shared, int group, int warp) {
    consume_backward_query(params, shared, group, warp);
  });
#endif
}

}  // namespace nsa
