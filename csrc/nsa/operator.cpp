// nsa_attention = gate_cmp * compressed + gate_slc * selected + gate_win * window, and its forward with all
// intermediate results (its backward: backward.cpp). They call the branches' ops through the dispatcher, so one body
// serves every backend.
#include "nsa/operator.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "host/autograd.h"
#include "host/checks.h"
#include "host/results.h"
#include "range/branches.h"
#include "selected/branches.h"
#if defined(NSA_CUDA_VERSION)
#include "nsa/cuda/call.h"
#include "range/cuda/call.h"
#include "selected/cuda/call.h"
#include "selection/cuda/call.h"
#endif

namespace nsa {
void check_nsa(const NsaInputs& in, const AttentionOptions& options) {
  constexpr AttentionNames kCompressed{"q", "k_cmp", "v_cmp"};
  constexpr AttentionNames kSelected{"q", "k_slc", "v_slc"};
  check_scale(options.scale);
  check_block_sizes(options.block_size, options.block_stride, options.select_size);
  check_window_length(options.window);
  check_queries_keys(in.q, in.k_slc, options.packing, kSelected);
  check_values(in.q, in.k_slc, in.v_slc, kSelected);
  check_query_length(in.q, in.k_slc.sym_size(-3), "q", "k_slc", options.packing);
  check_like("k_win", in.k_win, "q", in.q);
  check_shape("k_win", in.k_win, in.k_slc.sym_sizes(), "the shape of k_slc");
  check_like("v_win", in.v_win, "q", in.q);
  check_shape("v_win", in.v_win, in.v_slc.sym_sizes(), "the shape of v_slc");
  check_queries_keys(in.q, in.k_cmp, options.packing, kCompressed);
  check_values(in.q, in.k_cmp, in.v_cmp, kCompressed);
  TORCH_CHECK_VALUE(in.k_cmp.sym_size(-2) == in.k_slc.sym_size(-2), "k_cmp must have the heads of k_slc, ",
                    in.k_slc.sym_size(-2), ", got ", in.k_cmp.sym_size(-2));
  TORCH_CHECK_VALUE(in.v_cmp.sym_size(-1) == in.v_slc.sym_size(-1), "v_cmp must have the head dimension of v_slc, ",
                    in.v_slc.sym_size(-1), ", got ", in.v_cmp.sym_size(-1));
  check_compressed_length(in.q, in.k_cmp, in.k_slc.sym_size(-3), options.block_size, options.block_stride,
                          options.packing);
  check_floating("gates", in.gates);
  check_same_device("gates", in.gates, "q", in.q);
  c10::SymDimVector shape(in.q.sym_sizes().begin(), in.q.sym_sizes().end());
  shape.back() = 3;
  check_shape("gates", in.gates, shape, "(B, Tq, Hq, 3)");
  if (options.block_indices.has_value()) {
    check_block_indices(*options.block_indices, in.q, in.k_slc);
  }
}

namespace {

at::Tensor combine(const at::Tensor& gates, std::array<at::Tensor, 3> outs, at::ScalarType type) {
  at::Tensor sum = outs[0].to(type) * gate_of(gates, 0, type);
  for (int64_t branch = 1; branch < 3; ++branch) {
    sum.addcmul_(outs[branch].to(type), gate_of(gates, branch, type));
  }
  return sum.to(outs[0].scalar_type());
}

at::Tensor choose_blocks(const NsaInputs& in, const at::Tensor& lse_cmp, int64_t num_selected,
                         const ForcedBlocks& forced, const AttentionOptions& o) {
  if (o.block_indices.has_value()) {
    return o.block_indices->clone();
  }
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, OptionalInt, int64_t, int64_t,
                               int64_t, int64_t, int64_t, int64_t, OptionalDouble, const OptionalTensor&,
                               const OptionalTensor&, OptionalInt, OptionalInt, const OptionalTensor&);
  static const auto op = find_op<Signature>("nsa::select_blocks");
  return call_packed(op, o.packing, in.q, in.k_cmp, lse_cmp, o.seqlen_k, o.block_size, o.block_stride, o.select_size,
                     num_selected, forced.initial, forced.local, o.scale);
}

// All results, or out alone: whether out_win is defined then depends on the kernel.
NsaResults run_forward(const NsaInputs& in, AttentionOptions options, int64_t num_selected, const ForcedBlocks& forced,
                       [[maybe_unused]] bool all_results) {
  check_block_budget(num_selected, forced.initial, forced.local);
  check_nsa(in, options);
  options.seqlen_k = in.k_slc.sym_size(-3);
#if defined(NSA_CUDA_VERSION)
  if (in.q.is_cuda() && options.block_indices.has_value()) {
    cuda::check_lists_fit(in.q, in.v_slc, *options.block_indices);
  } else if (in.q.is_cuda()) {
    cuda::check_selection_supported(in.q, in.k_cmp, options.select_size, num_selected, options);
  }
#endif
  auto [out_cmp, lse_cmp] = CompressedBranch::forward(in.q, in.k_cmp, in.v_cmp, options);
  options.block_indices = choose_blocks(in, lse_cmp, num_selected, forced, options);
  auto [out_slc, lse_slc] = SelectedBranch::forward(in.q, in.k_slc, in.v_slc, options);
#if defined(NSA_CUDA_VERSION)
  if (in.q.is_cuda()) {
    auto [out, out_win, lse_win] = cuda::gated_window(in, options, out_cmp, out_slc, all_results);
    return {out, out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, *options.block_indices};
  }
#endif
  auto [out_win, lse_win] = WindowBranch::forward(in.q, in.k_win, in.v_win, options);
  const at::Tensor out = combine(in.gates, {out_cmp, out_slc, out_win}, wide_dtype(in.q));
  return {out, out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, *options.block_indices};
}

template <bool all_results>
auto nsa_attention(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& v_cmp, const at::Tensor& k_slc,
                   const at::Tensor& v_slc, const at::Tensor& k_win, const at::Tensor& v_win, const at::Tensor& gates,
                   int64_t block_size, int64_t block_stride, int64_t select_size, int64_t num_selected,
                   int64_t num_initial, int64_t num_local, c10::SymInt window, OptionalDouble scale,
                   const OptionalTensor& block_indices, const OptionalTensor& cu_seqlens_q,
                   const OptionalTensor& cu_seqlens_k, OptionalInt max_seqlen_q, OptionalInt max_seqlen_k,
                   const OptionalTensor& seqused_k) {
  NsaResults results = run_forward(
      {q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates},
      nsa_options(block_size, block_stride, select_size, std::move(window), scale, block_indices,
                  {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), seqused_k}),
      num_selected, {num_initial, num_local}, all_results);
  if constexpr (all_results) {
    return results;
  } else {
    return std::get<0>(results);
  }
}

void register_composition(torch::Library& m) {
  m.impl("nsa_attention", nsa_attention<false>);
  m.impl("nsa_attention_forward", nsa_attention<true>);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) { register_composition(m); }
TORCH_LIBRARY_IMPL(nsa, Meta, m) { register_composition(m); }
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { register_composition(m); }

}  // namespace nsa
