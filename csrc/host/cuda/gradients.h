// What the backwards of the branches on CUDA have in common: the gradients that they return, and copies where kernels
// cannot read or write a tensor in place.
#pragma once

#include <ATen/core/Tensor.h>

#include "host/options.h"

namespace nsa::cuda {

class GradientTensors {
 public:
  // With `grad_q`, the gradient of q is added to it. Keys of no sequence and keys not in use, which no kernel visits,
  // have gradients of 0.
  GradientTensors(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const Packing& packing, const at::Tensor& grad_q);

  // For a call without queries or keys: zeros.
  AttentionGradients zeros() const;
  // When the kernels have written.
  AttentionGradients finish() const;

  at::Tensor q, k, v, grad_out;       // to be read
  at::Tensor grad_q, grad_k, grad_v;  // to be written
  bool add_to_grad_q;                 // whether the kernels add to grad_q

 private:
  Packing packing_;
  bool given_;  // whether the caller gave a gradient of q
  at::Tensor dq_, dk_, dv_;
};

}  // namespace nsa::cuda
