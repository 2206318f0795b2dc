// The backward of nsa_attention: the gradients of the gates, and those of the branches that are asked for.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "host/checks.h"
#include "host/results.h"
#include "nsa/operator.h"
#include "range/branches.h"
#include "selected/branches.h"
#if defined(NSA_CUDA_VERSION)
#include "range/cuda/call.h"
#include "selected/cuda/call.h"
#endif

namespace nsa {
namespace {

constexpr GradientMask kNoGradients{};

// What is asked for of a branch's q, k and v.
GradientMask of_branch(const NsaMask& mask, int64_t branch) {
  return {mask.front(), mask[1 + 2 * branch], mask[2 + 2 * branch]};
}

NsaGradients whole_gradients(const at::Tensor& dq, const AttentionGradients& cmp, const AttentionGradients& slc,
                             const AttentionGradients& win, const at::Tensor& grad_gates, const at::Tensor& q) {
  const auto all = [&](const at::Tensor& gradient) { return or_nothing(gradient, q); };
  return {all(dq),
          all(std::get<1>(cmp)),
          all(std::get<2>(cmp)),
          all(std::get<1>(slc)),
          all(std::get<2>(slc)),
          all(std::get<1>(win)),
          all(std::get<2>(win)),
          all(grad_gates)};
}

#if defined(NSA_CUDA_VERSION)
// Gates are applied within the branches' kernels, which also add up the gradient of q: no gate_b dO and no dq of a
// branch is ever stored.
NsaGradients cuda_backward(const at::Tensor& grad_out, const NsaInputs& in, const std::array<at::Tensor, 3>& outs,
                           const std::array<at::Tensor, 3>& lses, const NsaMask& mask,
                           const AttentionOptions& options) {
  cuda::check_lists_fit(in.q, in.v_slc, *options.block_indices);
  const cuda::GateGradients gates = cuda::gate_gradients(grad_out, in.gates, outs, lses);
  AttentionOptions of_window = options;
  of_window.branch = Branch::kWindow;
  AttentionGradients cmp, slc, win;
  if (of_branch(mask, 0) != kNoGradients) {
    cmp =
        cuda::range_attention_backward(grad_out, in.q, in.k_cmp, in.v_cmp, gates.rows[0], of_branch(mask, 0), options);
  }
  const at::Tensor& dq = std::get<0>(cmp);
  if (of_branch(mask, 1) != kNoGradients) {
    slc = cuda::selected_attention_backward(grad_out, in.q, in.k_slc, in.v_slc, gates.rows[1], of_branch(mask, 1),
                                            options, dq);
  }
  if (of_branch(mask, 2) != kNoGradients) {
    win = cuda::range_attention_backward(grad_out, in.q, in.k_win, in.v_win, gates.rows[2], of_branch(mask, 2),
                                         of_window, dq);
  }
  const at::Tensor grad_gates = mask.back() ? gates.grad_gates : at::Tensor();
  cuda::fill_unused_rows(options.packing, {{dq}, {grad_gates}});
  return whole_gradients(dq, cmp, slc, win, grad_gates, in.q);
}
#endif

// On any backend, by ATen's operations between the branches' ops.
NsaGradients composed_backward(const at::Tensor& grad_out, const NsaInputs& in, const std::array<at::Tensor, 3>& outs,
                               const std::array<at::Tensor, 3>& lses, const NsaMask& mask,
                               const AttentionOptions& options) {
  const at::ScalarType type = wide_dtype(in.q);
  const at::Tensor wide_grad = grad_out.to(type);
  const auto of = [&](BranchBackward& backward, int64_t branch, const at::Tensor& k, const at::Tensor& v) {
    const GradientMask wanted = of_branch(mask, branch);
    if (wanted == kNoGradients) {
      return AttentionGradients{};
    }
    const at::Tensor grad = (wide_grad * gate_of(in.gates, branch, type)).to(in.q.scalar_type());
    return backward(grad, std::nullopt, in.q, k, v, outs[branch], lses[branch], wanted, options);
  };
  const AttentionGradients cmp = of(CompressedBranch::backward, 0, in.k_cmp, in.v_cmp);
  const AttentionGradients slc = of(SelectedBranch::backward, 1, in.k_slc, in.v_slc);
  const AttentionGradients win = of(WindowBranch::backward, 2, in.k_win, in.v_win);
  at::Tensor dq, grad_gates;
  if (mask.front()) {
    dq = std::get<0>(cmp);
    dq.add_(std::get<0>(slc)).add_(std::get<0>(win));
  }
  if (mask.back()) {
    std::vector<at::Tensor> of_branches;
    for (const at::Tensor& out : outs) {
      of_branches.push_back((wide_grad * out.to(type)).sum(-1));
    }
    grad_gates = at::stack(of_branches, -1).to(in.gates.scalar_type());
  }
  return whole_gradients(dq, cmp, slc, win, grad_gates, in.q);
}

// d gate_b = <dO, O_b>; branch b gets the gradient gate_b dO.
NsaGradients nsa_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k_cmp,
                                    const at::Tensor& v_cmp, const at::Tensor& k_slc, const at::Tensor& v_slc,
                                    const at::Tensor& k_win, const at::Tensor& v_win, const at::Tensor& gates,
                                    const at::Tensor& out_cmp, const at::Tensor& lse_cmp, const at::Tensor& out_slc,
                                    const at::Tensor& lse_slc, const at::Tensor& out_win, const at::Tensor& lse_win,
                                    const at::Tensor& block_indices, NsaMask output_mask, int64_t block_size,
                                    int64_t block_stride, int64_t select_size, c10::SymInt window, OptionalDouble scale,
                                    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                    OptionalInt max_seqlen_q, OptionalInt max_seqlen_k,
                                    const OptionalTensor& seqused_k) {
  AttentionOptions options =
      nsa_options(block_size, block_stride, select_size, std::move(window), scale, block_indices,
                  {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), seqused_k});
  options.seqlen_k = k_slc.sym_size(-3);
  const NsaInputs in{q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates};
  check_nsa(in, options);
  check_backward(grad_out, std::nullopt, q, v_slc, out_slc, lse_slc);
  const std::array<at::Tensor, 3> outs{out_cmp, out_slc, out_win};
  const std::array<at::Tensor, 3> lses{lse_cmp, lse_slc, lse_win};
#if defined(NSA_CUDA_VERSION)
  if (q.is_cuda()) {
    return cuda_backward(grad_out, in, outs, lses, output_mask, options);
  }
#endif
  return composed_backward(grad_out, in, outs, lses, output_mask, options);
}

void register_backward(torch::Library& m) { m.impl("nsa_attention_backward", nsa_attention_backward); }

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) { register_backward(m); }
TORCH_LIBRARY_IMPL(nsa, Meta, m) { register_backward(m); }
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { register_backward(m); }

}  // namespace nsa
