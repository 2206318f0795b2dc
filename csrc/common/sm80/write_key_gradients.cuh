// The end of a tile of keys (common/sm80/key_gradients.cuh): its sums go to the gradients, or to partial sums that are
// added up in order afterwards.
#pragma once

#include "common/sm80/key_gradients.cuh"

namespace nsa {

// Calls store(key of the tile, column, sum, sum of the next column) for this lane's sums.
template <int kTiles, typename Store>
__device__ inline void for_each_pair(int first_column, const float (&sums)[1][kTiles][4], const Store& store) {
  const int lane = this_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = this_warp() * 16 + lane / 4 + 8 * half;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      store(key, first_column + 8 * i + 2 * (lane % 4), sums[0][i][2 * half], sums[0][i][2 * half + 1]);
    }
  }
}

// Where the gradients of a tile of keys go: the first key's rows.
struct KeyGradientRows {
  void* k;
  void* v;
  int64_t k_stride;
  int64_t v_stride;
  int32_t k_width;
  int32_t v_width;
  int32_t count;  // keys that exist

  template <typename Element, typename Params>
  static __device__ KeyGradientRows of(const Params& params, int64_t batch, int64_t first_key, int32_t head_kv,
                                       int32_t count) {
    return {params.grad_k.template row<Element>(batch, first_key, head_kv),
            params.grad_v.template row<Element>(batch, first_key, head_kv),
            params.grad_k.token_stride,
            params.grad_v.token_stride,
            params.grad_k.width,
            params.grad_v.width,
            count};
  }
};

template <typename Element, int kTiles>
__device__ inline void store_rounded(void* to, int64_t stride, int32_t count, int32_t width, int first_column,
                                     const float (&sums)[1][kTiles][4], float factor) {
  for_each_pair(first_column, sums, [&](int key, int column, float x, float y) {
    if (key < count && column < width) {
      *reinterpret_cast<uint32_t*>(static_cast<Element*>(to) + key * stride + column) =
          pack<Element>(x * factor, y * factor);
    }
  });
}

// Rounds the sums of part `part` into the gradients.
template <typename Shape>
__device__ inline void store_key_gradients(const KeyGradientRows& to, int part, const KeyGradients<Shape>& sums,
                                           float scale) {
  using Element = typename Shape::Element;
  store_rounded<Element>(to.k, to.k_stride, to.count, to.k_width, part * Shape::kOutK, sums.k, scale);
  store_rounded<Element>(to.v, to.v_stride, to.count, to.v_width, part * Shape::kOutV, sums.v, 1.f);
}

// Partial sums lie side by side, each (kKeys, kDimK + kDimV), that of the keys first.
template <typename Shape>
__device__ inline float* partial_sums(float* partials, int64_t index) {
  return partials + index * (Shape::kKeys * (Shape::kDimK + Shape::kDimV));
}

// The same, unrounded, into a partial sum.
template <typename Shape>
__device__ inline void store_partial(float* to, int part, const KeyGradients<Shape>& sums, float scale) {
  const auto store_with = [&](float factor) {
    return [=](int key, int column, float x, float y) {
      *reinterpret_cast<float2*>(to + key * (Shape::kDimK + Shape::kDimV) + column) =
          make_float2(x * factor, y * factor);
    };
  };
  for_each_pair(part * Shape::kOutK, sums.k, store_with(scale));
  for_each_pair(Shape::kDimK + part * Shape::kOutV, sums.v, store_with(1.f));
}

// Adds `count` partial sums in their order, and rounds them into the gradients.
template <typename Shape>
__device__ inline void add_partials(const float* partials, int32_t count, const KeyGradientRows& to) {
  using Element = typename Shape::Element;
  constexpr int kRowSize = Shape::kDimK + Shape::kDimV;
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kKeys * kRowSize; i += static_cast<int>(blockDim.x)) {
    const int key = i / kRowSize;
    const int column = i % kRowSize;
    const bool of_k = column < Shape::kDimK;
    if (key >= to.count || (of_k ? column >= to.k_width : column - Shape::kDimK >= to.v_width)) {
      continue;
    }
    float sum = 0.f;
    for (int32_t p = 0; p < count; ++p) {
      sum += partials[static_cast<int64_t>(p) * Shape::kKeys * kRowSize + i];
    }
    if (of_k) {
      static_cast<Element*>(to.k)[key * to.k_stride + column] = from_float<Element>(sum);
    } else {
      static_cast<Element*>(to.v)[key * to.v_stride + column - Shape::kDimK] = from_float<Element>(sum);
    }
  }
}

}  // namespace nsa
