// Attention over a range of keys, on CUDA: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "gates/cuda/call.h"
#include "host/options.h"

namespace nsa::cuda {

// sum = gates[0] others[0] + gates[1] others[1] + gates[2] out, of contiguous tensors in the shape of out.
struct Gating {
  GatesView gates;
  std::array<at::Tensor, 2> others;
  at::Tensor sum;
};

struct RangeAttention {
  at::Tensor out;
  bool sum_taken;  // whether the kernel wrote the sum as well
};
// The compressed or the window branch, as options.branch says. Writes lse, which is allocated, and `out`. With a sum,
// `out` may be undefined: it is then allocated where the kernel does not take the sum, and stays so where it does.
RangeAttention range_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const AttentionOptions& options, at::Tensor out, const at::Tensor& lse,
                                       const Gating& gating = {});

// dq, dk, dv, where they are `wanted`. With `grad_q`, dq is added to it instead.
AttentionGradients range_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const BackwardRows& rows, const GradientMask& wanted,
                                            const AttentionOptions& options, const at::Tensor& grad_q = {});

}  // namespace nsa::cuda
