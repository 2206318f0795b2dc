// compressed_attention, window_attention and their backwards: checks, results, and the registrations of every backend.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "range/cpu/kernels.h"
#if defined(NSA_CUDA_VERSION)
#include "host/cuda/params.h"
#include "range/cuda/call.h"
#endif
#include "host/backend.h"
#include "host/checks.h"
#include "host/options.h"
#include "host/results.h"

namespace nsa {
namespace {

constexpr AttentionNames kCompressedNames{"q", "k_cmp", "v_cmp"};

void check_compressed(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options) {
  check_scale(options.scale);
  check_block_sizes(options.block_size, options.block_stride);
  check_queries_keys(q, k, options.packing, kCompressedNames);
  check_values(q, k, v, kCompressedNames);
  check_compressed_length(q, k, options.seqlen_k, options.block_size, options.block_stride, options.packing);
}

void check_window(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options) {
  check_scale(options.scale);
  check_window_length(options.window);
  check_queries_keys(q, k, options.packing, {});
  check_values(q, k, v, {});
  check_query_length(q, k.sym_size(-3), "q", "k", options.packing);
}

// Calls run(sequences, keys) with those of the options' branch, for the kernels for the CPU.
template <typename Run>
auto with_cpu_keys(const at::Tensor& q, const at::Tensor& k, const AttentionOptions& options, const Run& run) {
  if (options.branch == Branch::kCompressed) {
    return run(place_compressed_sequences(q, k, options),
               cpu::CompressedKeys{{options.block_size, options.block_stride}});
  }
  return run(place_sequences(options.packing, q.size(0), q.size(-3), k.size(-3)),
             cpu::WindowKeys{{options.window.guard_int(__FILE__, __LINE__)}});
}

// Either branch, after its checks.
template <Backend backend>
OutAndLse run_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options) {
  const OutAndLse results = empty_results(q, v);
  const at::Tensor& out = std::get<0>(results);
  const at::Tensor& lse = std::get<1>(results);
  if constexpr (backend == Backend::kCpu) {
    with_cpu_keys(q, k, options, [&](const std::vector<SequencePlace>& sequences, const auto& keys) {
      cpu::range_attention_forward(q, k, v, softmax_scale(options.scale, q.size(-1)), sequences, keys, out, lse);
    });
  }
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    cuda::range_attention_forward(q, k, v, options, out, lse);
  }
#endif
  return results;
}

template <Backend backend>
AttentionGradients run_backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& q,
                                const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                                const GradientMask& output_mask, const AttentionOptions& options) {
  check_backward(grad_out, grad_lse, q, v, out, lse);
  if constexpr (backend == Backend::kCpu) {
    return with_cpu_keys(q, k, options, [&](const std::vector<SequencePlace>& sequences, const auto& keys) {
      return cpu::range_attention_backward(grad_out, grad_lse, q, k, v, out, lse,
                                           softmax_scale(options.scale, q.size(-1)), sequences, keys, output_mask);
    });
  }
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    return cuda::range_attention_backward(grad_out, q, k, v, cuda::backward_rows(grad_out, out, lse, grad_lse),
                                          output_mask, options);
  }
#endif
  return empty_gradients(q, k, v, output_mask);
}

template <Backend backend>
OutAndLse compressed_attention(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& v_cmp,
                               OptionalInt seqlen_k, int64_t block_size, int64_t block_stride, OptionalDouble scale,
                               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                               OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  const AttentionOptions options = compressed_options(
      seqlen_k, block_size, block_stride, scale, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k});
  check_compressed(q, k_cmp, v_cmp, options);
  return run_forward<backend>(q, k_cmp, v_cmp, options);
}

template <Backend backend>
AttentionGradients compressed_attention_backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                                 const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& v_cmp,
                                                 const at::Tensor& out, const at::Tensor& lse, GradientMask output_mask,
                                                 OptionalInt seqlen_k, int64_t block_size, int64_t block_stride,
                                                 OptionalDouble scale, const OptionalTensor& cu_seqlens_q,
                                                 const OptionalTensor& cu_seqlens_k, OptionalInt max_seqlen_q,
                                                 OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  const AttentionOptions options = compressed_options(
      seqlen_k, block_size, block_stride, scale, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k});
  check_compressed(q, k_cmp, v_cmp, options);
  return or_nothing(run_backward<backend>(grad_out, grad_lse, q, k_cmp, v_cmp, out, lse, output_mask, options), q);
}

template <Backend backend>
OutAndLse window_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, c10::SymInt window,
                           OptionalDouble scale, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                           OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  const AttentionOptions options =
      window_options(window, scale, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k});
  check_window(q, k, v, options);
  return run_forward<backend>(q, k, v, options);
}

template <Backend backend>
AttentionGradients window_attention_backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& out, const at::Tensor& lse, GradientMask output_mask,
                                             c10::SymInt window, OptionalDouble scale,
                                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                             OptionalInt max_seqlen_q, OptionalInt max_seqlen_k,
                                             const OptionalTensor& seqused_k) {
  const AttentionOptions options =
      window_options(window, scale, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k});
  check_window(q, k, v, options);
  return or_nothing(run_backward<backend>(grad_out, grad_lse, q, k, v, out, lse, output_mask, options), q);
}

template <Backend backend>
void register_backend(torch::Library& m) {
  m.impl("compressed_attention", compressed_attention<backend>);
  m.impl("compressed_attention_backward", compressed_attention_backward<backend>);
  m.impl("window_attention", window_attention<backend>);
  m.impl("window_attention_backward", window_attention_backward<backend>);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) { register_backend<Backend::kCpu>(m); }
TORCH_LIBRARY_IMPL(nsa, Meta, m) { register_backend<Backend::kMeta>(m); }
#if defined(NSA_CUDA_VERSION)
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { register_backend<Backend::kCuda>(m); }
#endif

}  // namespace nsa
