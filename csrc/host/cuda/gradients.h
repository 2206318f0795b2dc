// What the backwards of the branches on CUDA have in common: the gradients that they return, and copies where kernels
// cannot read or write a tensor in place.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/plan.h"
#include "host/cuda/params.h"
#include "host/options.h"

namespace nsa::cuda {

class GradientTensors {
 public:
  // With `grad_q`, the gradient of q is added to it. Keys of no sequence and keys not in use, which no kernel visits,
  // have gradients of 0. The gradients of k and v, which come of one kernel, are both there where one is `wanted`.
  GradientTensors(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const Packing& packing, const GradientMask& wanted, const at::Tensor& grad_q);

  // What kernels have to compute.
  NeededGradients needed() const { return {.query = dq_.defined(), .keys = dk_.defined()}; }
  // For a call without queries or keys: zeros.
  AttentionGradients zeros() const;
  // When the kernels have written.
  AttentionGradients finish() const;

  // Tells a kernel's params of them.
  template <typename Params>
  void tell(Params& params) const {
    params.q = view_of(q);
    params.k = view_of(k);
    params.v = view_of(v);
    params.grad_out = view_of(grad_out);
    if (dq_.defined()) {
      params.grad_q = view_of(grad_q);
    }
    if (dk_.defined()) {
      params.grad_k = view_of(grad_k);
      params.grad_v = view_of(grad_v);
    }
    params.add_to_grad_q = add_to_grad_q;
  }

  at::Tensor q, k, v, grad_out;       // to be read
  at::Tensor grad_q, grad_k, grad_v;  // to be written; undefined: not needed
  bool add_to_grad_q;                 // whether the kernels add to grad_q

 private:
  AttentionGradients wanted() const;

  Packing packing_;
  GradientMask wanted_;
  bool given_;  // whether the caller gave a gradient of q
  at::Tensor dq_, dk_, dv_;
};

}  // namespace nsa::cuda
