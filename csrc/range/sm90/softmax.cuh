// The softmax of Hopper's attention over a range: masks, and weights with maxima that seldom move.
#pragma once

#include "common/softmax.cuh"

namespace nsa {

// Sets columns before `low`, or from `high` on, of one of the lane's two rows to -inf.
template <int kTiles>
__device__ inline void drop_before(float (&c)[kTiles][4], int half, int32_t low, int lane) {
  const int32_t of_lane = low - 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    float& score = c[i / 2][2 * half + i % 2];
    score = 8 * (i / 2) + i % 2 < of_lane ? kMinusInfinity : score;
  }
}
template <int kTiles>
__device__ inline void drop_from(float (&c)[kTiles][4], int half, int32_t high, int lane) {
  const int32_t of_lane = high - 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    float& score = c[i / 2][2 * half + i % 2];
    score = 8 * (i / 2) + i % 2 < of_lane ? score : kMinusInfinity;
  }
}

// As RunningSoftmax::weigh, but the maxima stay as they are until one rises by more than kRise (as an exponent to base
// 2): returns whether it did, and what was summed before is to be multiplied with `factors`.
constexpr float kRise = 8.f;
template <int kTiles>
__device__ inline bool weigh_lazily(RunningSoftmax<1>& softmax, float (&scores)[kTiles][4], float (&factors)[2],
                                    float scale_log2) {
  float highest[2];
  bool rises = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    highest[half] = softmax.maximum[0][half];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      highest[half] = fmaxf(highest[half], fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
    }
    highest[half] = row_max(highest[half]);
    rises = rises || (highest[half] - softmax.maximum[0][half]) * scale_log2 > kRise;
  }
  rises = __any_sync(0xffffffffu, rises);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (rises) {
      const float offset = highest[half] == kMinusInfinity ? 0.f : highest[half] * scale_log2;
      factors[half] = exp2_approx(fmaf(softmax.maximum[0][half], scale_log2, -offset));
      softmax.sum[0][half] *= factors[half];
      softmax.maximum[0][half] = highest[half];
    }
    const float maximum = softmax.maximum[0][half];
    const float offset = maximum == kMinusInfinity ? 0.f : maximum * scale_log2;
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
    softmax.sum[0][half] += total;
  }
  return rises;
}

}  // namespace nsa
