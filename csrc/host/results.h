// Allocation of what the attention ops return.
#pragma once

#include <ATen/Functions.h>

#include "host/checks.h"
#include "host/options.h"

namespace nsa {

inline OutAndLse empty_results(const at::Tensor& q, const at::Tensor& v) {
  c10::SymDimVector shape(q.sym_sizes().begin(), q.sym_sizes().end());
  shape.back() = v.sym_size(-1);
  return {at::empty_symint(shape, q.options()), at::empty_symint(lse_shape(q), q.options().dtype(lse_dtype(q)))};
}

// An op returns tensors: a gradient that is not asked for is one of no elements.
inline at::Tensor or_nothing(const at::Tensor& gradient, const at::Tensor& like) {
  return gradient.defined() ? gradient : at::empty({0}, like.options());
}

inline AttentionGradients or_nothing(const AttentionGradients& gradients, const at::Tensor& like) {
  const auto& [dq, dk, dv] = gradients;
  return {or_nothing(dq, like), or_nothing(dk, like), or_nothing(dv, like)};
}

inline AttentionGradients empty_gradients(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const GradientMask& output_mask) {
  const auto empty = [&](const at::Tensor& of, bool wanted) {
    return wanted ? at::empty_symint(of.sym_sizes(), of.options()) : at::Tensor();
  };
  return {empty(q, output_mask[0]), empty(k, output_mask[1]), empty(v, output_mask[2])};
}

}  // namespace nsa
