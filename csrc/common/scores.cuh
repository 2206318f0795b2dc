// The two products that every attention kernel is made of, for the fragments of common/sm80/tile.cuh.
#pragma once

#include "common/sm80/tile.cuh"

namespace nsa {

// scores[r] = rows [left_row + 16 r, ...) of `left` times all rows of `right`, transposed, over kColumns of both.
template <int kRowTiles, int kTiles, typename Left, typename Right>
__device__ inline void multiply_transposed(float (&scores)[kRowTiles][kTiles][4], const Left& left, int left_row,
                                           const Right& right, int lane) {
  using Element = typename Left::Element;
  static_assert(Left::kColumns == Right::kColumns && Right::kRows >= 8 * kTiles && kTiles % 2 == 0);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    clear(scores[r]);
  }
#pragma unroll
  for (int column = 0; column < Left::kColumns; column += 16) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      left.load_left(a[r], left_row + 16 * r, column, lane);
    }
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      uint32_t b[4];
      right.load_right_transposed(b, 16 * i, column, lane);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_add<Element>(scores[r][2 * i], a[r], b[0], b[1]);
        multiply_add<Element>(scores[r][2 * i + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// sums[r] += weights[r], rounded to Element, times `right`, whose rows are the weights' columns; columns of `right`
// from `first_column` on.
template <int kRowTiles, int kTiles, int kOutTiles, typename Right>
__device__ inline void accumulate(float (&sums)[kRowTiles][kOutTiles][4], const float (&weights)[kRowTiles][kTiles][4],
                                  const Right& right, int first_column, int lane) {
  using Element = typename Right::Element;
#pragma unroll
  for (int i = 0; i < kTiles / 2; ++i) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      as_left<Element>(a[r], weights[r], i);
    }
#pragma unroll
    for (int column = 0; column < 8 * kOutTiles; column += 16) {
      uint32_t b[4];
      right.load_right(b, 16 * i, first_column + column, lane);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_add<Element>(sums[r][column / 8], a[r], b[0], b[1]);
        multiply_add<Element>(sums[r][column / 8 + 1], a[r], b[2], b[3]);
      }
    }
  }
}

}  // namespace nsa
