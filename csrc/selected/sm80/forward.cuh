// Attention over listed blocks, forward: see token.cuh.
#pragma once

#include "selected/params.h"
#include "selected/sm80/token.cuh"

namespace nsa {

// scores = the 16 rows, as left operands of `Shape::kDimK / 16` steps, times the keys of a unit.
template <typename Shape>
__device__ inline void score_unit(float (&scores)[2][4], const uint32_t (&q)[Shape::kDimK / 16][4],
                                  const typename Shape::KTile& k_tile) {
  using Element = typename Shape::Element;
  clear(scores);
#pragma unroll
  for (int i = 0; i < Shape::kDimK / 16; ++i) {
    uint32_t b[4];
    k_tile.load_right_transposed(b, 0, 16 * i, this_lane());
    multiply_add<Element>(scores[0], q[i], b[0], b[1]);
    multiply_add<Element>(scores[1], q[i], b[2], b[3]);
  }
}

// The warps' softmaxes become one: each scales its sums to the highest maximum.
template <int kWarps>
struct TokenSoftmax {
  float maxima[kWarps][16];
  float totals[kWarps][16];

  __device__ void put(const RunningSoftmax<1>& softmax) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(softmax.sum[0][half]);
      if (this_lane() % 4 == 0) {
        maxima[this_warp()][this_lane() / 4 + 8 * half] = softmax.maximum[0][half];
        totals[this_warp()][this_lane() / 4 + 8 * half] = total;
      }
    }
  }

  // What this warp's sums of one of the lane's rows are multiplied with. Writes the row's lse.
  __device__ float factor(const RunningSoftmax<1>& softmax, int half, float scale_log2, const RowView& lse,
                          const TokenPlace& at) const {
    const int row = this_lane() / 4 + 8 * half;
    float highest = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      highest = fmaxf(highest, maxima[i][row]);
    }
    const float offset = highest == kMinusInfinity ? 0.f : highest * scale_log2;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      sum += totals[i][row] * exp2_approx(fmaf(maxima[i][row], scale_log2, -offset));
    }
    const bool empty = highest == kMinusInfinity;
    if (this_warp() == 0 && this_lane() % 4 == 0 && row < at.heads) {
      lse.at(at.place.batch, at.first_head + row, at.place.q_begin + at.query) =
          empty ? kMinusInfinity : (offset + log2f(sum)) * kLn2;
    }
    return empty ? 0.f : exp2_approx(fmaf(softmax.maximum[0][half], scale_log2, -offset)) / sum;
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    selected_forward_sm80(const __grid_constant__ SelectedForwardParams params) {
  using Element = typename Shape::Element;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ TokenSoftmax<Shape::kWarps> softmaxes;
  __shared__ int32_t entries;
  const typename Shape::QTile q_tile{reinterpret_cast<Element*>(shared)};
  const TokenBuffers<Shape> buffers{q_tile.data + q_tile.kSize};
  const int lane = this_lane();

  const TokenPlace at = token_place(params.sequences, count_tokens(params.sequences), params.num_selected);
  buffers.read_list(params, at, entries);
  copy_heads(q_tile, params.q, at);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t q[Shape::kDimK / 16][4];
#pragma unroll
  for (int i = 0; i < Shape::kDimK / 16; ++i) {
    q_tile.load_left(q[i], 0, 16 * i, lane);
  }

  const float sign = params.scale < 0.f ? -1.f : 1.f;
  const float scale_log2 = params.scale * sign * kLog2E;
  RunningSoftmax<1> softmax;
  float out[1][Shape::kDimV / 8][4];
  clear(out[0]);
  for (auto feed = buffers.feed(params, at, entries); !feed.walk.done(); feed.walk.advance()) {
    feed.begin_step();
    float scores[1][2][4];
    score_unit<Shape>(scores[0], q, feed.k_tile(feed.stage));
    if (sign < 0.f) {
      negate(scores[0]);
    }
    const KeyUnit unit = feed.walk.unit();
    if (unit.count < 16) {
      keep_first(scores[0], unit.count, lane);
    }
    softmax.step(0, scores[0], out[0], scale_log2);
    accumulate(out, scores, feed.v_tile(feed.stage), 0, lane);
    feed.end_step();
  }

  wait_copies<0>();
  softmaxes.put(softmax);
  __syncthreads();
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    factor[half] = softmaxes.factor(softmax, half, scale_log2, params.lse, at);
  }
  store_sums(buffers.own_sums(), out[0], factor, lane);
  __syncthreads();
  write_heads<Element, Shape::kDimV>(params.out, buffers.sums(), buffers.kFloatsApart, at, 1.f, false);
}

}  // namespace nsa
