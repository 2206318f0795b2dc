// Attention over listed blocks, backward: the gradient of q. See selected/sm80/token.cuh.
#pragma once

#include "selected/params.h"
#include "selected/sm80/token.cuh"

namespace nsa {

template <typename Shape>
constexpr int64_t selected_backward_query_shared_bytes(int32_t num_selected) {
  return selected_forward_shared_bytes<Shape>(num_selected) +
         sizeof(typename Shape::Element) * Shape::GradOutTile::kSize;
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    selected_backward_query_sm80(const __grid_constant__ SelectedBackwardParams params) {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  extern __shared__ __align__(128) unsigned char shared[];
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared)};
  const typename Shape::GradOutTile grad_out_tile{q_tile.data + q_tile.kSize};
  Element* const buffers = grad_out_tile.data + grad_out_tile.kSize;
  int32_t* const list = reinterpret_cast<int32_t*>(buffers + Shape::kWarps * Shape::kStages * Shape::kStageSize);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  Element* const own = buffers + warp * Shape::kStages * Shape::kStageSize;

  const TokenPlace at = token_place(params.sequences, count_tokens(params.sequences), params.num_selected);
  const int32_t limit = min(at.position + 1, at.place.k_length);
  __shared__ int32_t entries;
  if (warp == 0) {
    read_list(list, entries, params.block_indices + at.list, params.num_selected, params.select_size, limit, lane);
  }
  copy_heads(q_tile, params.q, at, thread, Shape::kThreads);
  copy_heads(grad_out_tile, params.grad_out, at, thread, Shape::kThreads);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  UnitWalk ahead(list, entries, params.select_size, limit, warp);
  UnitWalk walk = ahead;
  const auto copy_next = [&](int stage) {
    if (!ahead.done()) {
      const KeyUnit unit = ahead.unit();
      const KTile k_tile{own + stage * Shape::kStageSize};
      const VTile v_tile{k_tile.data + KTile::kSize};
      const int64_t first = at.place.k_begin + unit.first_key;
      k_tile.template copy_consecutive<32>(params.k.row<Element>(at.place.batch, first, at.head_kv),
                                           params.k.token_stride, unit.count, params.k.width, lane);
      v_tile.template copy_consecutive<32>(params.v.row<Element>(at.place.batch, first, at.head_kv),
                                           params.v.token_stride, unit.count, params.v.width, lane);
      ahead.advance();
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage + 1 < Shape::kStages; ++stage) {
    copy_next(stage);
  }

  float lse[2];
  float delta[2];
  float gate[2];
  float grad_lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t head = at.first_head + min(lane / 4 + 8 * half, at.heads - 1);
    const int64_t token = at.place.q_begin + at.query;
    lse[half] = params.lse.at(at.place.batch, head, token) * kLog2E;
    delta[half] = params.delta.at(at.place.batch, head, token);
    gate[half] = params.gate.data == nullptr ? 1.f : params.gate.at(at.place.batch, head, token);
    grad_lse[half] = params.grad_lse.data == nullptr ? 0.f : params.grad_lse.at(at.place.batch, head, token);
  }
  const float scale_log2 = params.scale * kLog2E;
  float grad_q[1][Shape::kDimK / 8][4];
  clear(grad_q[0]);
  int stage = 0;
  for (; !walk.done(); walk.advance()) {
    __syncwarp();
    copy_next(stage == 0 ? Shape::kStages - 1 : stage - 1);
    wait_copies<Shape::kStages - 1>();
    __syncwarp();
    const KTile k_tile{own + stage * Shape::kStageSize};
    const VTile v_tile{k_tile.data + KTile::kSize};
    float scores[1][2][4];
    float grads[1][2][4];
    multiply_transposed(scores, q_tile, 0, k_tile, lane);
    multiply_transposed(grads, grad_out_tile, 0, v_tile, lane);
    const KeyUnit unit = walk.unit();
    if (unit.count < 16) {
      keep_first(scores[0], unit.count, lane);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float score = scores[0][i][j];
        const float probability = score == kMinusInfinity ? 0.f : exp2_approx(fmaf(score, scale_log2, -lse[j / 2]));
        scores[0][i][j] = probability > kWholeProbability<Element>
                              ? grad_lse[j / 2]
                              : probability * gate[j / 2] * (grads[0][i][j] - delta[j / 2]);
      }
    }
    accumulate(grad_q, scores, k_tile, 0, lane);
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }

  wait_copies<0>();
  __syncwarp();
  constexpr int kApart = Shape::kStages * Shape::kStageSize * sizeof(Element) / sizeof(float);
  const float factor[2] = {1.f, 1.f};
  store_sums(reinterpret_cast<float*>(own), grad_q[0], factor, lane);
  __syncthreads();
  write_heads<Element, Shape::kDimK>(params.grad_q, reinterpret_cast<const float*>(buffers), kApart, at, params.scale,
                                     params.add_to_grad_q, thread, Shape::kThreads);
}

}  // namespace nsa
