// The running softmax of a warp's rows, held as accumulators (common/sm80/tile.cuh): two rows per lane and 16 x 8 tile,
// four lanes per row.
#pragma once

#include "common/rows.cuh"
#include "common/sm80/tile.cuh"

namespace nsa {

struct SoftmaxResult {
  float factor;  // what the output is multiplied with: 1 / sum, or 0 for a row that saw no key
  float lse;     // natural logarithm; -inf for such a row
};

template <int kTiles>
__device__ inline void negate(float (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      c[i][j] = -c[i][j];
    }
  }
}

// Sets columns outside [low, high) of one of the lane's two rows to -inf.
template <int kTiles>
__device__ inline void keep_range(float (&c)[kTiles][4], int half, int32_t low, int32_t high, int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t column = 8 * i + 2 * (lane % 4) + j;
      if (column < low || column >= high) {
        c[i][2 * half + j] = kMinusInfinity;
      }
    }
  }
}

template <int kRowTiles>
struct RunningSoftmax {
  float maximum[kRowTiles][2];
  float sum[kRowTiles][2];  // of this lane's columns only

  __device__ RunningSoftmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[r][half] = kMinusInfinity;
        sum[r][half] = 0.f;
      }
    }
  }

  // Turns scores into exp(scale (score - maximum)), and rescales `out` to the new maximum. scale_log2 > 0 or tiny.
  template <int kTiles, int kOutTiles>
  __device__ void step(int r, float (&scores)[kTiles][4], float (&out)[kOutTiles][4], float scale_log2) {
    float factors[2];
    weigh(r, scores, factors, scale_log2);
    rescale(out, factors);
  }

  // The same for two rows' scores alone: what was summed before is to be multiplied with `factors`.
  template <int kTiles>
  __device__ void weigh(int r, float (&scores)[kTiles][4], float (&factors)[2], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = maximum[r][half];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        highest = fmaxf(highest, fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
      }
      highest = row_max(highest);
      const float offset = highest == kMinusInfinity ? 0.f : highest * scale_log2;
      factors[half] = exp2_approx(fmaf(maximum[r][half], scale_log2, -offset));
      maximum[r][half] = highest;
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
      sum[r][half] = fmaf(sum[r][half], factors[half], total);
    }
  }

  template <int kOutTiles>
  static __device__ void rescale(float (&out)[kOutTiles][4], const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < kOutTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[i][j] *= factors[j / 2];
      }
    }
  }

  __device__ SoftmaxResult finish(int r, int half, float scale_log2) const {
    const float total = row_sum(sum[r][half]);
    if (!(total > 0.f) && total == total) {
      return {0.f, kMinusInfinity};
    }
    return {1.f / total, (maximum[r][half] * scale_log2 + log2f(total)) * kLn2};
  }
};

// One of the lane's two rows of an accumulator, times `factor`, rounded, into row `row` of a tile.
template <typename Element, typename SharedTile, int kTiles>
__device__ inline void store_row(const SharedTile& to, int row, const float (&c)[kTiles][4], int half, float factor,
                                 int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    Element* chunk = to.chunk(row, i) + 2 * (lane % 4);
    *reinterpret_cast<uint32_t*>(chunk) = pack<Element>(c[i][2 * half] * factor, c[i][2 * half + 1] * factor);
  }
}

}  // namespace nsa
