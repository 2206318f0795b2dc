// What a warp does with one block of a union: scores, softmax and sums of the tokens that chose it.
#pragma once

#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "selected/union_sm90.cuh"

namespace nsa {

// One token's softmax and sums.
template <int kDimV>
struct TokenSums {
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

// Rows of a right operand from `count` on become zeros: their weights are 0, but what lies there need not be finite.
__device__ inline void clear_rows(uint32_t (&b)[4], int row, int count, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int first = row + 8 * i + 2 * (lane % 4);
    const uint32_t keep = first + 1 < count ? 0xffffffffu : first < count ? 0x0000ffffu : 0u;
    b[i] &= keep;
    b[i + 2] &= keep;
  }
}

// One block for the warp's tokens [kFirst, kFirst + kCount); only its first `keys` keys when kMasked.
template <typename Shape, int kFirst, int kCount, bool kMasked>
__device__ inline void union_step(TokenSums<Shape::kDimV> (&sums)[Shape::kWarpTokens], typename Shape::Element* q_data,
                                  const typename Shape::KTile& k_tile, const typename Shape::VTile& v_tile,
                                  int32_t keys, float scale_log2, bool negative, int lane) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  constexpr int kPart = Shape::kPartKeys;
#pragma unroll 1
  for (int part = 0; part < (kMasked ? min(keys, Shape::kKeys) : Shape::kKeys); part += kPart) {
    const typename Shape::KTile k_part{k_tile.begin + part * 128};
    const typename Shape::VTile v_part{v_tile.begin + part * 128};
    float scores[kCount][kPart / 8][4];
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      clear(scores[t]);
    }
#pragma unroll
    for (int column = 0; column < Shape::kDimK; column += 16) {
      uint32_t a[kCount][4];
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        QTile{q_data + (kFirst + t) * QTile::kSize}.load_left(a[t], 0, column, lane);
      }
#pragma unroll
      for (int i = 0; i < kPart / 16; ++i) {
        uint32_t b[4];
        k_part.load_right_transposed(b, 16 * i, column, lane);
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
          multiply_add<Element>(scores[t][2 * i], a[t], b[0], b[1]);
          multiply_add<Element>(scores[t][2 * i + 1], a[t], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      if (negative) {
        negate(scores[t]);
      }
      if constexpr (kMasked) {
        keep_range(scores[t], 0, 0, keys - part, lane);
        keep_range(scores[t], 1, 0, keys - part, lane);
      }
      sums[kFirst + t].step(scores[t], scale_log2);
    }
#pragma unroll
    for (int i = 0; i < kPart / 16; ++i) {
      if (kMasked && part + 16 * i >= keys) {
        break;
      }
      uint32_t a[kCount][4];
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        as_left<Element>(a[t], scores[t], i);
      }
#pragma unroll
      for (int column = 0; column < Shape::kDimV; column += 16) {
        uint32_t b[4];
        v_part.load_right(b, 16 * i, column, lane);
        if constexpr (kMasked) {
          clear_rows(b, 16 * i, keys - part, lane);
        }
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
          multiply_add<Element>(sums[kFirst + t].out[column / 8], a[t], b[0], b[1]);
          multiply_add<Element>(sums[kFirst + t].out[column / 8 + 1], a[t], b[2], b[3]);
        }
      }
    }
  }
}

}  // namespace nsa
