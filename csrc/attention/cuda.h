// Attention over a range of keys, on CUDA: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include "host/cuda/params.h"
#include "host/options.h"

namespace nsa::cuda {

// Writes out and lse, which are allocated. Keys are compressed ones when options.block_stride is not 0.
void range_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const AttentionOptions& options, const at::Tensor& out, const at::Tensor& lse);

// dq, dk, dv. With `grad_q`, dq is added to it instead.
AttentionGradients range_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const BackwardRows& rows,
                                            const AttentionOptions& options, const at::Tensor& grad_q = {});

}  // namespace nsa::cuda
