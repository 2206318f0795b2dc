// What the kernel of rotations is told.
#pragma once

#include "common/params.h"

namespace nsa {

// cos or sin of (B, T, D) angles, float32; strides of 0 where tokens or batch entries share them. D's is 1.
struct AnglesView {
  const float* data;
  int64_t batch_stride;
  int64_t token_stride;

  NSA_HOST_DEVICE const float* row(int64_t batch, int64_t token) const {
    return data + batch * batch_stride + token * token_stride;
  }
};

struct RotateParams {
  uint32_t rows;  // B T, below 2^31
  int32_t heads;
  int32_t half;  // D / 2
  bool transposed;
  Divisor by_tokens;  // T
  TensorView x;       // (B, T, H, D)
  AnglesView cos;     // (B, T, D)
  AnglesView sin;     // (B, T, D)
  TensorView out;     // (B, T, H, D)
  // How a block of threads is shared out: set by the launch.
  int32_t lanes = 0;  // threads of a row of one head
  int32_t slots = 0;  // rows of a token at once
  int32_t tokens_per_block = 0;
  Divisor by_lanes;
  Divisor by_token;  // lanes times slots
};

}  // namespace nsa
