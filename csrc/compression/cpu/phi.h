// phi, the map from a block of tokens to one compressed token, on any device by ATen's operations; and what other ways
// to compute it do with the weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "compression/plan.h"
#include "host/packing.h"

namespace nsa {

// pe (l, D), w1 (O, l * D), b1 (O), w2 (D', O), b2 (D'), each possibly with a leading Hkv; which are there decides the
// kind: w2 an MLP, w1 alone a linear map, none the mean.
struct PhiWeights {
  std::optional<at::Tensor> pe, w1, b1, w2, b2;
};

struct PhiGradients {
  at::Tensor x, pe, w1, b1, w2, b2;  // undefined where they are not asked for
};

PhiGradients zero_gradients(const at::Tensor& x, const PhiWeights& weights, const PhiMask& wanted);

// (H, ...) as the gradient of a weight: summed over the heads where it has `shared_dim` dimensions and so none of
// heads.
at::Tensor sum_to(const at::Tensor& per_head, const at::Tensor& weight, int64_t shared_dim);

// (O, l D) -> (l/d * O, d D), the parts of W1 one below the other.
at::Tensor split_weight(const at::Tensor& w1, int64_t pieces);
// Its inverse, for the gradient.
at::Tensor join_weight(const at::Tensor& parts, int64_t pieces);

at::Tensor phi_forward(const at::Tensor& x, const PhiWeights& weights, int64_t block_size, int64_t block_stride,
                       const Packing& packing);

PhiGradients phi_backward(const at::Tensor& grad_out, const at::Tensor& x, const PhiWeights& weights,
                          int64_t block_size, int64_t block_stride, const Packing& packing, const PhiMask& wanted);

}  // namespace nsa
