// Rotary position embedding: channel c of a head's first half, a, and of its second, b, turn as a pair:
//   out_a = cos_a a - sin_a b,    out_b = cos_b b + sin_b a
// or, transposed, as the gradient needs it:
//   out_a = cos_a a + sin_b b,    out_b = cos_b b - sin_a a
// in float32, rounded once. Every element is read once and written once: bound by HBM.
//
// Grid: a block of threads for some tokens. A thread has kWidth pairs, whose angles it reads once for all heads of its
// token that it turns: kHeads at a time, whose loads are under way together.
#pragma once

#include "common/sm80/mma.cuh"
#include "rotate/cuda/params.h"

namespace nsa {

constexpr int kRotateThreads = 256;
constexpr int kHeadsAtOnce = 4;

// kWidth consecutive elements: 16 bytes, or one element where rows aren't aligned.
template <typename Element, int kWidth>
struct alignas(sizeof(Element) * kWidth) Channels {
  Element elements[kWidth];
};

template <int kWidth>
struct Angles {
  float cos_a[kWidth], cos_b[kWidth];
  float a_of_b[kWidth], b_of_a[kWidth];  // what b adds to out_a, a to out_b

  __device__ Angles(const RotateParams& params, const float* cos, const float* sin) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float sin_a = sin[i];
      const float sin_b = sin[params.half + i];
      cos_a[i] = cos[i];
      cos_b[i] = cos[params.half + i];
      a_of_b[i] = params.transposed ? sin_b : -sin_a;
      b_of_a[i] = params.transposed ? -sin_a : sin_b;
    }
  }
};

template <typename Element, int kWidth>
__device__ inline void turn(const Angles<kWidth>& angles, Channels<Element, kWidth>& first,
                            Channels<Element, kWidth>& second) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float a = to_float(first.elements[i]);
    const float b = to_float(second.elements[i]);
    first.elements[i] = from_float<Element>(angles.cos_a[i] * a + angles.a_of_b[i] * b);
    second.elements[i] = from_float<Element>(angles.cos_b[i] * b + angles.b_of_a[i] * a);
  }
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kRotateThreads) rotate_pairs(const __grid_constant__ RotateParams params) {
  using Pack = Channels<Element, kWidth>;
  const uint32_t within = params.by_token.divide(threadIdx.x);
  const uint32_t rest = threadIdx.x - within * params.by_token.divisor;
  const uint32_t row = blockIdx.x * static_cast<uint32_t>(params.tokens_per_block) + within;
  if (within >= static_cast<uint32_t>(params.tokens_per_block) || row >= params.rows) {
    return;
  }
  const int64_t batch = params.by_tokens.divide(row);
  const int64_t token = row - batch * params.by_tokens.divisor;
  const auto slot = static_cast<int32_t>(params.by_lanes.divide(rest));
  const auto lane = static_cast<int32_t>(rest - static_cast<uint32_t>(slot * params.lanes));
  for (int32_t column = lane * kWidth; column < params.half; column += params.lanes * kWidth) {
    const Angles<kWidth> angles(params, params.cos.row(batch, token) + column, params.sin.row(batch, token) + column);
    for (int32_t begin = slot; begin < params.heads; begin += kHeadsAtOnce * params.slots) {
      Pack first[kHeadsAtOnce];
      Pack second[kHeadsAtOnce];
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) {
        const int32_t head = begin + i * params.slots;
        if (head < params.heads) {
          const Element* const from = params.x.row<const Element>(batch, token, head) + column;
          first[i] = *reinterpret_cast<const Pack*>(from);
          second[i] = *reinterpret_cast<const Pack*>(from + params.half);
        }
      }
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) {
        const int32_t head = begin + i * params.slots;
        if (head < params.heads) {
          turn(angles, first[i], second[i]);
          Element* const to = params.out.row<Element>(batch, token, head) + column;
          *reinterpret_cast<Pack*>(to) = first[i];
          *reinterpret_cast<Pack*>(to + params.half) = second[i];
        }
      }
    }
  }
}

}  // namespace nsa
