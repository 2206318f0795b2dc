// selected_attention with gradients for q, k and v.
#include <torch/library.h>

#include "host/branch_function.h"
#include "selected/branches.h"

namespace nsa {
namespace {

OutAndLse selected_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& block_indices, int64_t select_size, OptionalDouble scale,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                             OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  return apply_branch<SelectedBranch>(
      q, k, v,
      selected_options(select_size, scale, block_indices,
                       {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), seqused_k}));
}

}  // namespace

OutAndLse SelectedBranch::forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const AttentionOptions& o) {
  static const auto op = find_op<decltype(selected_attention)>("nsa::selected_attention");
  return call_packed(op, o.packing, q, k, v, *o.block_indices, o.select_size, o.scale);
}

AttentionGradients SelectedBranch::backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                            const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                            const at::Tensor& out, const at::Tensor& lse, GradientMask output_mask,
                                            const AttentionOptions& o) {
  static const auto op =
      find_op<AttentionGradients(const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
                                 const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 GradientMask, int64_t, OptionalDouble, const OptionalTensor&, const OptionalTensor&,
                                 OptionalInt, OptionalInt, const OptionalTensor&)>("nsa::selected_attention_backward");
  return call_packed(op, o.packing, grad_out, grad_lse, q, k, v, *o.block_indices, out, lse, output_mask, o.select_size,
                     o.scale);
}

TORCH_LIBRARY_IMPL(nsa, Autograd, m) {
  m.impl("selected_attention", selected_attention);
  m.impl("selected_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace nsa
