// nsa_attention = gate_cmp * compressed + gate_slc * selected + gate_win * window, its forward with all intermediate
// results, and its backward. They call the branches' ops through the dispatcher, so one body serves every backend.
#include "nsa/operator.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "host/autograd.h"
#include "host/checks.h"
#include "range/branches.h"
#include "selected/branches.h"
#if defined(NSA_CUDA_VERSION)
#include "nsa/cuda/call.h"
#include "range/cuda/call.h"
#include "selected/cuda/call.h"
#include "selection/cuda/call.h"
#endif

namespace nsa {
namespace {

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

// The dtype in which gates are applied and their gradients summed.
at::ScalarType wide_dtype(const at::Tensor& q) { return lse_dtype(q); }

// (B, Tq, Hq, 1): the gate of one branch.
at::Tensor gate_of(const at::Tensor& gates, int64_t branch, at::ScalarType type) {
  return gates.narrow(-1, branch, 1).to(type);
}

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

#if defined(NSA_CUDA_VERSION)
// Gates are applied within the branches' kernels, which also add up the gradient of q: no gate_b dO and no dq of a
// branch is ever stored.
NsaGradients cuda_backward(const at::Tensor& grad_out, const NsaInputs& in, const std::array<at::Tensor, 3>& outs,
                           const std::array<at::Tensor, 3>& lses, const AttentionOptions& options) {
  cuda::check_lists_fit(in.q, in.v_slc, *options.block_indices);
  const cuda::GateGradients gates = cuda::gate_gradients(grad_out, in.gates, outs, lses);
  AttentionOptions of_window = options;
  of_window.branch = Branch::kWindow;
  auto [dq, dk_cmp, dv_cmp] =
      cuda::range_attention_backward(grad_out, in.q, in.k_cmp, in.v_cmp, gates.rows[0], options);
  auto [dq_slc, dk_slc, dv_slc] =
      cuda::selected_attention_backward(grad_out, in.q, in.k_slc, in.v_slc, gates.rows[1], options, dq);
  auto [dq_win, dk_win, dv_win] =
      cuda::range_attention_backward(grad_out, in.q, in.k_win, in.v_win, gates.rows[2], of_window, dq);
  cuda::fill_unused_rows(options.packing, {{dq}, {gates.grad_gates}});
  return {dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, gates.grad_gates};
}
#endif

// d gate_b = <dO, O_b>; branch b gets the gradient gate_b dO.
NsaGradients nsa_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k_cmp,
                                    const at::Tensor& v_cmp, const at::Tensor& k_slc, const at::Tensor& v_slc,
                                    const at::Tensor& k_win, const at::Tensor& v_win, const at::Tensor& gates,
                                    const at::Tensor& out_cmp, const at::Tensor& lse_cmp, const at::Tensor& out_slc,
                                    const at::Tensor& lse_slc, const at::Tensor& out_win, const at::Tensor& lse_win,
                                    const at::Tensor& block_indices, int64_t block_size, int64_t block_stride,
                                    int64_t select_size, c10::SymInt window, OptionalDouble scale,
                                    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                    OptionalInt max_seqlen_q, OptionalInt max_seqlen_k,
                                    const OptionalTensor& seqused_k) {
  AttentionOptions options =
      nsa_options(block_size, block_stride, select_size, std::move(window), scale, block_indices,
                  {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), seqused_k});
  options.seqlen_k = k_slc.sym_size(-3);
  check_nsa({q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates}, options);
  const at::ScalarType type = wide_dtype(q);
  check_backward(grad_out, std::nullopt, q, v_slc, out_slc, lse_slc);
#if defined(NSA_CUDA_VERSION)
  if (q.is_cuda()) {
    return cuda_backward(grad_out, {q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates}, {out_cmp, out_slc, out_win},
                         {lse_cmp, lse_slc, lse_win}, options);
  }
#endif
  const at::Tensor wide_grad = grad_out.to(type);
  const std::array<at::Tensor, 3> outs{out_cmp, out_slc, out_win};
  std::vector<at::Tensor> grad_gates;
  for (const at::Tensor& out : outs) {
    grad_gates.push_back((wide_grad * out.to(type)).sum(-1));
  }
  const auto branch_grad = [&](int64_t branch) {
    return (wide_grad * gate_of(gates, branch, type)).to(q.scalar_type());
  };
  auto [dq_cmp, dk_cmp, dv_cmp] =
      CompressedBranch::backward(branch_grad(0), std::nullopt, q, k_cmp, v_cmp, out_cmp, lse_cmp, options);
  auto [dq_slc, dk_slc, dv_slc] =
      SelectedBranch::backward(branch_grad(1), std::nullopt, q, k_slc, v_slc, out_slc, lse_slc, options);
  auto [dq_win, dk_win, dv_win] =
      WindowBranch::backward(branch_grad(2), std::nullopt, q, k_win, v_win, out_win, lse_win, options);
  const at::Tensor dq = dq_cmp.add_(dq_slc).add_(dq_win);
  return {dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, at::stack(grad_gates, -1).to(gates.scalar_type())};
}

void register_composition(torch::Library& m) {
  m.impl("nsa_attention", nsa_attention<false>);
  m.impl("nsa_attention_forward", nsa_attention<true>);
  m.impl("nsa_attention_backward", nsa_attention_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) { register_composition(m); }
TORCH_LIBRARY_IMPL(nsa, Meta, m) { register_composition(m); }
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { register_composition(m); }

}  // namespace nsa
