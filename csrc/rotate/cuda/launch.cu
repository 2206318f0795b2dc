// Rotations (rotate/cuda/rotate.cuh): which element type, whether 16-byte loads will do, and how threads are shared
// out.
#include "common/launch.cuh"
#include "rotate/cuda/launch.h"
#include "rotate/cuda/rotate.cuh"

namespace nsa {
namespace {

bool aligned(const TensorView& t, int32_t half, int64_t bytes, int64_t width) {
  return reinterpret_cast<uintptr_t>(t.data) % static_cast<uint64_t>(bytes * width) == 0 && half % width == 0 &&
         t.batch_stride % width == 0 && t.token_stride % width == 0 && t.head_stride % width == 0;
}

template <typename Element, int kWidth>
void launch_of(RotateParams& params, cudaStream_t stream) {
  params.lanes = static_cast<int32_t>(min_of(ceil_div(params.half, kWidth), kRotateThreads));
  params.slots =
      static_cast<int32_t>(min_of(ceil_div(params.heads, kHeadsAtOnce), int64_t{kRotateThreads} / params.lanes));
  params.tokens_per_block = kRotateThreads / (params.lanes * params.slots);
  params.by_lanes = Divisor(static_cast<uint32_t>(params.lanes));
  params.by_token = Divisor(static_cast<uint32_t>(params.lanes * params.slots));
  launch(rotate_pairs<Element, kWidth>, ceil_div(params.rows, params.tokens_per_block), kRotateThreads, 0, stream,
         "rotate", params);
}

template <typename Element>
void launch_element(RotateParams& params, cudaStream_t stream) {
  constexpr int kMost = 16 / sizeof(Element);
  if (aligned(params.x, params.half, sizeof(Element), kMost) &&
      aligned(params.out, params.half, sizeof(Element), kMost)) {
    launch_of<Element, kMost>(params, stream);
  } else {
    launch_of<Element, 1>(params, stream);
  }
}

}  // namespace

void launch_rotate(RotateParams params, ElementType type, cudaStream_t stream) {
  if (params.rows == 0 || params.heads == 0 || params.half == 0) {
    return;
  }
  switch (type) {
    case ElementType::kFloat32:
      return launch_element<float>(params, stream);
    case ElementType::kFloat16:
      return launch_element<Half>(params, stream);
    case ElementType::kBFloat16:
      return launch_element<BFloat16>(params, stream);
  }
}

}  // namespace nsa
