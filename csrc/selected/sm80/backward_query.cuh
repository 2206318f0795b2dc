// Attention over listed blocks, backward: the gradient of q. See token.cuh.
#pragma once

#include "common/row_gradient.cuh"
#include "selected/params.h"
#include "selected/sm80/token.cuh"

namespace nsa {

// What a lane's two rows bring to the gradients of their scores.
struct TokenGradients {
  RowGradient of_row[2];
  float lse_log2[2];

  __device__ TokenGradients(const SelectedBackwardParams& params, const TokenPlace& at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t head = at.first_head + min(this_lane() / 4 + 8 * half, at.heads - 1);
      of_row[half] = RowGradient(params, at.place.batch, head, at.place.q_begin + at.query);
      lse_log2[half] = of_row[half].lse * kLog2E;
    }
  }

  // Turns scores, with `grads` = <dO, v>, into their gradients.
  template <typename Element>
  __device__ void grad_scores(float (&scores)[2][4], const float (&grads)[2][4], float scale_log2) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float score = scores[i][j];
        const float probability =
            score == kMinusInfinity ? 0.f : exp2_approx(fmaf(score, scale_log2, -lse_log2[j / 2]));
        scores[i][j] = of_row[j / 2].grad_score<Element>(probability, grads[i][j]);
      }
    }
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    selected_backward_query_sm80(const __grid_constant__ SelectedBackwardParams params) {
  using Element = typename Shape::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int32_t entries;
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared)};
  const typename Shape::GradOutTile grad_out_tile{q_tile.data + q_tile.kSize};
  const TokenBuffers<Shape> buffers{grad_out_tile.data + grad_out_tile.kSize};
  const int lane = this_lane();

  const TokenPlace at = token_place(params.sequences, count_tokens(params.sequences), params.num_selected);
  buffers.read_list(params, at, entries);
  copy_heads(q_tile, params.q, at);
  copy_heads(grad_out_tile, params.grad_out, at);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  auto feed = buffers.feed(params, at, entries);
  const TokenGradients gradients(params, at);
  const float scale_log2 = params.scale * kLog2E;
  float grad_q[1][Shape::kDimK / 8][4];
  clear(grad_q[0]);
  for (; !feed.walk.done(); feed.walk.advance()) {
    feed.begin_step();
    float scores[1][2][4];
    float grads[1][2][4];
    multiply_transposed(scores, q_tile, 0, feed.k_tile(feed.stage), lane);
    multiply_transposed(grads, grad_out_tile, 0, feed.v_tile(feed.stage), lane);
    const KeyUnit unit = feed.walk.unit();
    if (unit.count < 16) {
      keep_first(scores[0], unit.count, lane);
    }
    gradients.grad_scores<Element>(scores[0], grads[0], scale_log2);
    accumulate(grad_q, scores, feed.k_tile(feed.stage), 0, lane);
    feed.end_step();
  }

  wait_copies<0>();
  __syncwarp();
  const float factor[2] = {1.f, 1.f};
  store_sums(buffers.own_sums(), grad_q[0], factor, lane);
  __syncthreads();
  write_heads<Element, Shape::kDimK>(params.grad_q, buffers.sums(), buffers.kFloatsApart, at, params.scale,
                                     params.add_to_grad_q);
}

}  // namespace nsa
