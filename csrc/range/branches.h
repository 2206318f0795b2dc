// Calls of this folder's ops through the dispatcher, for their autograd Functions (host/branch_function.h) and for
// nsa/.
#pragma once

#include "host/options.h"

namespace nsa {

struct CompressedBranch {
  static OutAndLse forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const AttentionOptions& options);
  static AttentionGradients backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                                     const at::Tensor& lse, const AttentionOptions& options);
};

struct WindowBranch {
  static OutAndLse forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const AttentionOptions& options);
  static AttentionGradients backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& q,
                                     const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                                     const at::Tensor& lse, const AttentionOptions& options);
};

}  // namespace nsa
