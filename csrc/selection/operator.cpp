// select_blocks: checks, result, and the registrations of every backend. No gradient flows through the choice.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "host/autograd.h"
#include "host/backend.h"
#include "host/checks.h"
#include "host/options.h"
#include "selection/cpu/select.h"
#if defined(NSA_CUDA_VERSION)
#include "selection/cuda/call.h"
#endif

namespace nsa {
namespace {

constexpr AttentionNames kNames{"q", "k_cmp", "v_cmp"};

void check_lse(const at::Tensor& lse, const at::Tensor& q) {
  TORCH_CHECK_TYPE(lse.scalar_type() == lse_dtype(q), "lse must be ", lse_dtype(q), ", got ", lse.scalar_type());
  check_same_device("lse", lse, "q", q);
  check_shape("lse", lse, lse_shape(q), "(B, Hq, Tq), packed (Hq, sum Tq)");
}

template <Backend backend>
at::Tensor select_blocks(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& lse, OptionalInt seqlen_k,
                         int64_t block_size, int64_t block_stride, int64_t select_size, int64_t num_selected,
                         int64_t num_initial, int64_t num_local, OptionalDouble scale,
                         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                         OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  const AttentionOptions options{
      .seqlen_k = seqlen_k,
      .block_size = block_size,
      .block_stride = block_stride,
      .scale = scale,
      .packing = {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k},
  };
  check_scale(scale);
  check_block_sizes(block_size, block_stride, select_size);
  check_block_budget(num_selected, num_initial, num_local);
  check_queries_keys(q, k_cmp, options.packing, kNames);
  check_compressed_length(q, k_cmp, seqlen_k, block_size, block_stride, options.packing);
  check_lse(lse, q);
  c10::SymDimVector shape(q.sym_sizes().begin(), q.sym_sizes().end());
  shape[shape.size() - 2] = k_cmp.sym_size(-2);
  shape.back() = num_selected;
  at::Tensor block_indices = at::empty_symint(shape, q.options().dtype(at::kInt));
  if constexpr (backend == Backend::kCpu) {
    cpu::select_blocks(q, k_cmp, lse, softmax_scale(scale, q.size(-1)),
                       {{block_size, block_stride}, select_size, num_selected, {num_initial, num_local}},
                       place_compressed_sequences(q, k_cmp, options), block_indices);
  }
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    cuda::select_blocks(q, k_cmp, lse, select_size, num_selected, {num_initial, num_local}, options, block_indices);
  }
#endif
  return block_indices;
}

at::Tensor select_blocks_autograd(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& lse,
                                  OptionalInt seqlen_k, int64_t block_size, int64_t block_stride, int64_t select_size,
                                  int64_t num_selected, int64_t num_initial, int64_t num_local, OptionalDouble scale,
                                  const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                  OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, const OptionalTensor& seqused_k) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = find_op<decltype(select_blocks_autograd)>("nsa::select_blocks");
  return op.call(q, k_cmp, lse, std::move(seqlen_k), block_size, block_stride, select_size, num_selected, num_initial,
                 num_local, scale, cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k),
                 seqused_k);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) { m.impl("select_blocks", select_blocks<Backend::kCpu>); }
TORCH_LIBRARY_IMPL(nsa, Meta, m) { m.impl("select_blocks", select_blocks<Backend::kMeta>); }
#if defined(NSA_CUDA_VERSION)
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { m.impl("select_blocks", select_blocks<Backend::kCuda>); }
#endif
TORCH_LIBRARY_IMPL(nsa, Autograd, m) { m.impl("select_blocks", select_blocks_autograd); }

}  // namespace nsa
