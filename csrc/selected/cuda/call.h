// Attention over listed blocks, on CUDA: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include "gates/cuda/call.h"
#include "host/options.h"

namespace nsa::cuda {

// ValueError where the shared memory of the GPU has no room for lists of this length. To be called before any kernel.
void check_lists_fit(const at::Tensor& q, const at::Tensor& v, const at::Tensor& block_indices);

// Writes out and lse, which are allocated. Lists can't be checked without waiting for the device: entries that are no
// block of the query's past are skipped.
void selected_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const AttentionOptions& options, const at::Tensor& out, const at::Tensor& lse);

// dq, dk, dv, where they are `wanted`. With `grad_q`, dq is added to it instead.
AttentionGradients selected_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v, const BackwardRows& rows,
                                               const GradientMask& wanted, const AttentionOptions& options,
                                               const at::Tensor& grad_q = {});

}  // namespace nsa::cuda
