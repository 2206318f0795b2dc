// The sum over a block's chunks, in float32, and its transpose:
//   shift_and_add:     out[m] = act(bias + sum over i < l/d of parts[m + i, i])
//   shift_and_spread:  grad_parts[m + i, i] = act'(bias + sum over j of parts[m + j, j]) grad[m]   for all i < l/d
// act is GELU, x Phi(x), by erf, or nothing.
//
// Grid: a block of threads for each row of blocks, or for each row of chunks. That of chunk c writes the entries of the
// block that starts there, and zeros to those entries of its own row that belong to no block: every entry is written
// once.
#pragma once

#include "compression/cuda/elements.cuh"
#include "compression/cuda/layout.cuh"

namespace nsa {

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kNormalPeak = 0.39894228040143268f;  // 1 / sqrt(2 pi)

__device__ inline float normal_cdf(float x) { return 0.5f * (1.f + erff(x * kSqrtHalf)); }
__device__ inline float gelu(float x) { return x * normal_cdf(x); }
__device__ inline float gelu_slope(float x) { return normal_cdf(x) + x * kNormalPeak * expf(-0.5f * x * x); }

template <int kWidth>
__device__ inline void load_bias(float (&to)[kWidth], const BiasView& bias, const Item& item) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    to[i] = bias.data == nullptr ? 0.f : bias.data[item.head * bias.head_stride + item.column + i];
  }
}

template <typename Part, int kWidth>
__device__ inline void add_parts(float (&sum)[kWidth], const ChunkRows& parts, int64_t row, int32_t pieces,
                                 const RowItems& items, const Item& item) {
  const Part* from = parts.row<const Part>(row, item.head) + item.column;
#pragma unroll 2
  for (int32_t i = 0; i < pieces; ++i) {
    add_columns(sum, from);
    from += parts.row_stride + items.width;
  }
}

template <typename Part, typename Element, int kWidth, bool kGelu>
__global__ void __launch_bounds__(256) shift_and_add(const __grid_constant__ ShiftAddParams params) {
  const int64_t chunk = first_chunk(params.layout, blockIdx.x);
  const int64_t row = params.from_blocks ? blockIdx.x : chunk;
  for (uint32_t number = threadIdx.x; number < params.items.count; number += blockDim.x) {
    const Item item = item_at<kWidth>(params.items, number);
    float sum[kWidth] = {};
    if (chunk >= 0) {
      load_bias(sum, params.bias, item);
      add_parts<Part>(sum, params.parts, row, params.pieces, params.items, item);
    }
    if constexpr (kGelu) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum[i] = gelu(sum[i]);
      }
    }
    store_columns(params.out.row<Element>(blockIdx.x, item.head) + item.column, sum);
  }
}

template <typename Element, int kWidth, bool kGelu>
__global__ void __launch_bounds__(256) shift_and_spread(const __grid_constant__ SpreadParams params) {
  const BlockLayout& layout = params.layout;
  const ChunkPlace place = place_of_chunk(layout, blockIdx.x);
  for (uint32_t number = threadIdx.x; number < params.items.count; number += blockDim.x) {
    const Item item = item_at<kWidth>(params.items, number);
    Element* const own_row = params.grad_parts.row<Element>(blockIdx.x, item.head) + item.column;
    if (place.has_block(0)) {
      float grad[kWidth] = {};
      if constexpr (kGelu) {
        add_columns(grad, params.grad.row<const float>(place.block, item.head) + item.column);
        float sum[kWidth];
        load_bias(sum, params.bias, item);
        add_parts<float>(sum, params.parts, blockIdx.x, layout.pieces, params.items, item);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          grad[i] *= gelu_slope(sum[i]);
        }
      } else {
        add_columns(grad, params.grad.row<const Element>(place.block, item.head) + item.column);
      }
      Element* to = own_row;
      for (int32_t piece = 0; piece < layout.pieces; ++piece) {
        store_columns(to, grad);
        to += params.grad_parts.row_stride + params.items.width;
      }
    }
    const float zeros[kWidth] = {};
    for (int32_t piece = 0; piece < layout.pieces; ++piece) {
      if (!place.has_block(piece)) {
        store_columns(own_row + int64_t{piece} * params.items.width, zeros);
      }
    }
  }
}

}  // namespace nsa
