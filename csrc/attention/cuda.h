// Attention over a range of keys, on CUDA: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "host/cuda/params.h"
#include "host/options.h"

namespace nsa::cuda {

// sum = gates[0] others[0] + gates[1] others[1] + gates[2] out, of contiguous tensors in the shape of out.
struct Gating {
  GatesView gates;
  std::array<at::Tensor, 2> others;
  at::Tensor sum;
};

// Writes out and lse, which are allocated. Keys are compressed ones when options.block_stride is not 0.
//
// With a sum, out may be undefined. Returns whether the sum is written too; where it is not, an undefined out means
// that nothing is.
bool range_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const AttentionOptions& options, const at::Tensor& out, const at::Tensor& lse,
                             const Gating& gating = {});

// dq, dk, dv. With `grad_q`, dq is added to it instead.
AttentionGradients range_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const BackwardRows& rows,
                                            const AttentionOptions& options, const at::Tensor& grad_q = {});

}  // namespace nsa::cuda
