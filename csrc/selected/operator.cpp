// selected_attention and its backward: checks, results, and the registrations of every backend.
#include <torch/library.h>

#include "host/backend.h"
#include "host/checks.h"
#include "host/options.h"
#include "host/results.h"
#include "selected/cpu/kernels.h"
#if defined(NSA_CUDA_VERSION)
#include "host/cuda/params.h"
#include "selected/cuda/call.h"
#endif

namespace nsa {
namespace {

void check_selected(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& block_indices,
                    int64_t select_size, const OptionalDouble& scale, const Packing& packing) {
  check_scale(scale);
  check_size("select_size", select_size, 1);
  check_queries_keys(q, k, packing, {});
  check_values(q, k, v, {});
  check_query_length(q, k.sym_size(-3), "q", "k", packing);
  check_block_indices(block_indices, q, k);
}

std::vector<SequencePlace> selected_sequences(const at::Tensor& q, const at::Tensor& k, const at::Tensor& block_indices,
                                              int64_t select_size, const Packing& packing) {
  std::vector<SequencePlace> sequences = place_sequences(packing, q.size(0), q.size(-3), k.size(-3));
  cpu::check_block_lists(block_indices, sequences, select_size);
  return sequences;
}

template <Backend backend>
OutAndLse selected_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& block_indices, int64_t select_size, OptionalDouble scale,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                             OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k};
  check_selected(q, k, v, block_indices, select_size, scale, packing);
  auto [out, lse] = empty_results(q, v);
  if constexpr (backend == Backend::kCpu) {
    cpu::selected_attention_forward(q, k, v, block_indices, select_size, softmax_scale(scale, q.size(-1)),
                                    selected_sequences(q, k, block_indices, select_size, packing), out, lse);
  }
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    cuda::check_lists_fit(q, v, block_indices);
    cuda::selected_attention_forward(q, k, v, selected_options(select_size, scale, block_indices, packing), out, lse);
  }
#endif
  return {out, lse};
}

template <Backend backend>
AttentionGradients selected_attention_backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                               const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                               const at::Tensor& block_indices, const at::Tensor& out,
                                               const at::Tensor& lse, GradientMask output_mask, int64_t select_size,
                                               OptionalDouble scale, const OptionalTensor& cu_seqlens_q,
                                               const OptionalTensor& cu_seqlens_k, OptionalInt max_seqlen_q,
                                               OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k};
  check_selected(q, k, v, block_indices, select_size, scale, packing);
  check_backward(grad_out, grad_lse, q, v, out, lse);
  if constexpr (backend == Backend::kCpu) {
    return or_nothing(
        cpu::selected_attention_backward(grad_out, grad_lse, q, k, v, block_indices, out, lse, select_size,
                                         softmax_scale(scale, q.size(-1)),
                                         selected_sequences(q, k, block_indices, select_size, packing), output_mask),
        q);
  }
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    cuda::check_lists_fit(q, v, block_indices);
    return or_nothing(
        cuda::selected_attention_backward(grad_out, q, k, v, cuda::backward_rows(grad_out, out, lse, grad_lse),
                                          output_mask, selected_options(select_size, scale, block_indices, packing)),
        q);
  }
#endif
  return or_nothing(empty_gradients(q, k, v, output_mask), q);
}

template <Backend backend>
void register_backend(torch::Library& m) {
  m.impl("selected_attention", selected_attention<backend>);
  m.impl("selected_attention_backward", selected_attention_backward<backend>);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) { register_backend<Backend::kCpu>(m); }
TORCH_LIBRARY_IMPL(nsa, Meta, m) { register_backend<Backend::kMeta>(m); }
#if defined(NSA_CUDA_VERSION)
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { register_backend<Backend::kCuda>(m); }
#endif

}  // namespace nsa
