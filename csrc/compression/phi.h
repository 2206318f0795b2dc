// phi, the map from a block of tokens to one compressed token, on any device by ATen's operations.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "host/packing.h"

namespace nsa {

// pe (l, D), w1 (O, l * D), b1 (O), w2 (D', O), b2 (D'), each possibly with a leading Hkv; which are there decides the
// kind: w2 an MLP, w1 alone a linear map, none the mean.
struct PhiWeights {
  std::optional<at::Tensor> pe, w1, b1, w2, b2;
};

struct PhiGradients {
  at::Tensor x, pe, w1, b1, w2, b2;  // undefined where there is no weight
};

at::Tensor phi_forward(const at::Tensor& x, const PhiWeights& weights, int64_t block_size, int64_t block_stride,
                       const Packing& packing);

PhiGradients phi_backward(const at::Tensor& grad_out, const at::Tensor& x, const PhiWeights& weights,
                          int64_t block_size, int64_t block_stride, const Packing& packing);

}  // namespace nsa
