// The softmax of Hopper's kernels: masks, and weights with maxima that seldom move.
#pragma once

#include "common/softmax.cuh"

namespace nsa {

// Sets columns before `bound`, or with kFrom those from it on, of one of the lane's two rows to -inf.
template <bool kFrom, int kTiles>
__device__ inline void drop_columns(float (&c)[kTiles][4], int half, int32_t bound, int lane) {
  const int32_t of_lane = bound - 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    float& score = c[i / 2][2 * half + i % 2];
    const bool before = 8 * (i / 2) + i % 2 < of_lane;
    score = before == kFrom ? score : kMinusInfinity;
  }
}

// As RunningSoftmax::weigh, but the maxima stay as they are until one rises by more than kRise (as an exponent to base
// 2), which is rare after the first keys: most steps leave what was summed before as it is. Returns whether one rose;
// rescale(half, factor) is called then for each of the lane's rows.
constexpr float kRise = 8.f;
template <int kTiles, typename Rescale>
__device__ inline bool weigh_lazily(RunningSoftmax<1>& softmax, float (&scores)[kTiles][4], float scale_log2,
                                    const Rescale& rescale) {
  float highest[2];
  bool rises = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    highest[half] = highest_score(scores, half, softmax.maximum[0][half]);
    rises = rises || (highest[half] - softmax.maximum[0][half]) * scale_log2 > kRise;
  }
  rises = __any_sync(0xffffffffu, rises);
  if (rises) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = rescaling(softmax.maximum[0][half], highest[half], scale_log2);
      softmax.sum[0][half] *= factor;
      softmax.maximum[0][half] = highest[half];
      rescale(half, factor);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    softmax.sum[0][half] += take_exponentials(scores, half, softmax.maximum[0][half], scale_log2);
  }
  return rises;
}

}  // namespace nsa
