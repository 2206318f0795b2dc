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

inline AttentionGradients empty_gradients(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return {at::empty_symint(q.sym_sizes(), q.options()), at::empty_symint(k.sym_sizes(), k.options()),
          at::empty_symint(v.sym_sizes(), v.options())};
}

}  // namespace nsa
