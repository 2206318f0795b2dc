// compressed_attention and window_attention with gradients.
#include <torch/library.h>

#include "host/branch_function.h"
#include "range/branches.h"

namespace nsa {
namespace {

OutAndLse compressed_attention(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& v_cmp,
                               OptionalInt seqlen_k, int64_t block_size, int64_t block_stride, OptionalDouble scale,
                               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                               OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  return apply_branch<CompressedBranch>(
      q, k_cmp, v_cmp,
      compressed_options(std::move(seqlen_k), block_size, block_stride, scale,
                         {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), seqused_k}));
}

OutAndLse window_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, c10::SymInt window,
                           OptionalDouble scale, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                           OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  return apply_branch<WindowBranch>(
      q, k, v,
      window_options(std::move(window), scale,
                     {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), seqused_k}));
}

}  // namespace

OutAndLse CompressedBranch::forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const AttentionOptions& o) {
  static const auto op = find_op<decltype(compressed_attention)>("nsa::compressed_attention");
  return call_packed(op, o.packing, q, k, v, o.seqlen_k, o.block_size, o.block_stride, o.scale);
}

AttentionGradients CompressedBranch::backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                              const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                              const at::Tensor& out, const at::Tensor& lse, GradientMask output_mask,
                                              const AttentionOptions& o) {
  static const auto op = find_op<AttentionGradients(
      const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, const at::Tensor&, GradientMask, OptionalInt, int64_t, int64_t, OptionalDouble,
      const OptionalTensor&, const OptionalTensor&, OptionalInt, OptionalInt, const OptionalTensor&)>(
      "nsa::compressed_attention_backward");
  return call_packed(op, o.packing, grad_out, grad_lse, q, k, v, out, lse, output_mask, o.seqlen_k, o.block_size,
                     o.block_stride, o.scale);
}

OutAndLse WindowBranch::forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const AttentionOptions& o) {
  static const auto op = find_op<decltype(window_attention)>("nsa::window_attention");
  return call_packed(op, o.packing, q, k, v, o.window, o.scale);
}

AttentionGradients WindowBranch::backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                          const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const at::Tensor& out, const at::Tensor& lse, GradientMask output_mask,
                                          const AttentionOptions& o) {
  static const auto op = find_op<AttentionGradients(
      const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, const at::Tensor&, GradientMask, c10::SymInt, OptionalDouble, const OptionalTensor&,
      const OptionalTensor&, OptionalInt, OptionalInt, const OptionalTensor&)>("nsa::window_attention_backward");
  return call_packed(op, o.packing, grad_out, grad_lse, q, k, v, out, lse, output_mask, o.window, o.scale);
}

TORCH_LIBRARY_IMPL(nsa, Autograd, m) {
  m.impl("compressed_attention", compressed_attention);
  m.impl("compressed_attention_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("window_attention", window_attention);
  m.impl("window_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace nsa
