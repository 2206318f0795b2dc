// Attention over listed blocks, forward: see selected/sm80/token.cuh.
#pragma once

#include "selected/params.h"
#include "selected/sm80/token.cuh"

namespace nsa {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    selected_forward_sm80(const __grid_constant__ SelectedForwardParams params) {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float maxima[Shape::kWarps][Shape::kRows];
  __shared__ float totals[Shape::kWarps][Shape::kRows];
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared)};
  Element* const buffers = q_tile.data + q_tile.kSize;
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
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t q[Shape::kDimK / 16][4];
#pragma unroll
  for (int i = 0; i < Shape::kDimK / 16; ++i) {
    q_tile.load_left(q[i], 0, 16 * i, lane);
  }

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

  const float sign = params.scale < 0.f ? -1.f : 1.f;
  const float scale_log2 = params.scale * sign * kLog2E;
  RunningSoftmax<1> softmax;
  float out[1][Shape::kDimV / 8][4];
  clear(out[0]);
  int stage = 0;
  for (; !walk.done(); walk.advance()) {
    __syncwarp();  // every lane is done with the buffer that is filled now
    copy_next(stage == 0 ? Shape::kStages - 1 : stage - 1);
    wait_copies<Shape::kStages - 1>();
    __syncwarp();
    const KTile k_tile{own + stage * Shape::kStageSize};
    const VTile v_tile{k_tile.data + KTile::kSize};
    float scores[1][2][4];
    clear(scores[0]);
#pragma unroll
    for (int i = 0; i < Shape::kDimK / 16; ++i) {
      uint32_t b[4];
      k_tile.load_right_transposed(b, 0, 16 * i, lane);
      multiply_add<Element>(scores[0][0], q[i], b[0], b[1]);
      multiply_add<Element>(scores[0][1], q[i], b[2], b[3]);
    }
    if (sign < 0.f) {
      negate(scores[0]);
    }
    const KeyUnit unit = walk.unit();
    if (unit.count < 16) {
      keep_first(scores[0], unit.count, lane);
    }
    softmax.step(0, scores[0], out[0], scale_log2);
    accumulate(out, scores, v_tile, 0, lane);
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }

  // The warps' softmaxes become one: each scales its sums to the highest maximum.
  wait_copies<0>();
  float total[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = row_sum(softmax.sum[0][half]);
    if (lane % 4 == 0) {
      maxima[warp][lane / 4 + 8 * half] = softmax.maximum[0][half];
      totals[warp][lane / 4 + 8 * half] = total[half];
    }
  }
  __syncthreads();
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    float highest = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < Shape::kWarps; ++i) {
      highest = fmaxf(highest, maxima[i][row]);
    }
    const float offset = highest == kMinusInfinity ? 0.f : highest * scale_log2;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Shape::kWarps; ++i) {
      sum += totals[i][row] * exp2_approx(fmaf(maxima[i][row], scale_log2, -offset));
    }
    const bool empty = highest == kMinusInfinity;
    factor[half] = empty ? 0.f : exp2_approx(fmaf(softmax.maximum[0][half], scale_log2, -offset)) / sum;
    if (warp == 0 && lane % 4 == 0 && row < at.heads) {
      params.lse.at(at.place.batch, at.first_head + row, at.place.q_begin + at.query) =
          empty ? kMinusInfinity : (offset + log2f(sum)) * kLn2;
    }
  }
  constexpr int kApart = Shape::kStages * Shape::kStageSize * sizeof(Element) / sizeof(float);
  store_sums(reinterpret_cast<float*>(own), out[0], factor, lane);
  __syncthreads();
  write_heads<Element, Shape::kDimV>(params.out, reinterpret_cast<const float*>(buffers), kApart, at, 1.f, false,
                                     thread, Shape::kThreads);
}

}  // namespace nsa
