// nsa_attention with gradients for every input but the choice of blocks. The branches' outputs and lse are saved: gate
// gradients and softmax backwards need them. Where no gradient is wanted, the op below autograd keeps none of them.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "host/branch_function.h"
#include "nsa/operator.h"

namespace nsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t kInputs = 8;   // q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates
constexpr size_t kResults = 7;  // out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, block_indices

NsaResults call_forward(const NsaInputs& in, int64_t num_selected, const ForcedBlocks& forced,
                        const AttentionOptions& o) {
  using Signature =
      NsaResults(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                 const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t,
                 int64_t, c10::SymInt, OptionalDouble, const OptionalTensor&, const OptionalTensor&,
                 const OptionalTensor&, OptionalInt, OptionalInt, const OptionalTensor&);
  static const auto op = find_op<Signature>("nsa::nsa_attention_forward");
  return call_packed(op, o.packing, in.q, in.k_cmp, in.v_cmp, in.k_slc, in.v_slc, in.k_win, in.v_win, in.gates,
                     o.block_size, o.block_stride, o.select_size, num_selected, forced.initial, forced.local, o.window,
                     o.scale, o.block_indices);
}

// `saved` holds the inputs, then the results.
NsaGradients call_backward(const at::Tensor& grad_out, const std::vector<OptionalTensor>& saved, const NsaMask& mask,
                           const AttentionOptions& o) {
  using Signature =
      NsaGradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, NsaMask, int64_t, int64_t, int64_t, c10::SymInt, OptionalDouble,
                   const OptionalTensor&, const OptionalTensor&, OptionalInt, OptionalInt, const OptionalTensor&);
  static const auto op = find_op<Signature>("nsa::nsa_attention_backward");
  return call_packed(op, o.packing, grad_out, *saved[0], *saved[1], *saved[2], *saved[3], *saved[4], *saved[5],
                     *saved[6], *saved[7], *saved[8], *saved[9], *saved[10], *saved[11], *saved[12], *saved[13],
                     *saved[14], mask, o.block_size, o.block_stride, o.select_size, o.window, o.scale);
}

class NsaFunction : public torch::autograd::Function<NsaFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& v_cmp,
                            const at::Tensor& k_slc, const at::Tensor& v_slc, const at::Tensor& k_win,
                            const at::Tensor& v_win, const at::Tensor& gates, int64_t num_selected,
                            const ForcedBlocks& forced, const AttentionOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const NsaResults results =
        call_forward({q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates}, num_selected, forced, options);
    const auto& [out, out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, block_indices] = results;
    std::vector<OptionalTensor> saved{q,       k_cmp,   v_cmp,   k_slc,   v_slc,   k_win,   v_win,        gates,
                                      out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, block_indices};
    const std::vector<OptionalTensor> of_options = option_tensors(options);
    saved.insert(saved.end(), of_options.begin(), of_options.end());
    save_tensors(ctx, saved);
    save_options(ctx, options);
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const std::vector<OptionalTensor> saved = load_tensors(ctx);
    if (!grads[0].defined()) {
      return variable_list(kInputs + 3);
    }
    const NsaMask mask = needed_gradients<kInputs>(ctx);
    auto [dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates] =
        call_backward(grads[0], saved, mask, load_options(ctx, &saved[kInputs + kResults]));
    variable_list result{dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates, {}, {}, {}};
    for (size_t i = 0; i < kInputs; ++i) {
      result[i] = if_needed(result[i], mask[i]);
    }
    return result;
  }
};

bool needs_gradients(const NsaInputs& in) {
  for (const at::Tensor& x : {in.q, in.k_cmp, in.v_cmp, in.k_slc, in.v_slc, in.k_win, in.v_win, in.gates}) {
    if (torch::autograd::compute_requires_grad(x) || x._fw_grad(0).defined()) {
      return true;
    }
  }
  return false;
}

at::Tensor nsa_attention(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& v_cmp, const at::Tensor& k_slc,
                         const at::Tensor& v_slc, const at::Tensor& k_win, const at::Tensor& v_win,
                         const at::Tensor& gates, int64_t block_size, int64_t block_stride, int64_t select_size,
                         int64_t num_selected, int64_t num_initial, int64_t num_local, c10::SymInt window,
                         OptionalDouble scale, const OptionalTensor& block_indices, const OptionalTensor& cu_seqlens_q,
                         const OptionalTensor& cu_seqlens_k, OptionalInt max_seqlen_q, OptionalInt max_seqlen_k,
                         const OptionalTensor& seqused_k) {
  const AttentionOptions options =
      nsa_options(block_size, block_stride, select_size, std::move(window), scale, block_indices,
                  {cu_seqlens_q, cu_seqlens_k, std::move(max_seqlen_q), std::move(max_seqlen_k), seqused_k});
  if (!needs_gradients({q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates})) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<decltype(nsa_attention)>("nsa::nsa_attention");
    return call_packed(op, options.packing, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, block_size,
                       block_stride, select_size, num_selected, num_initial, num_local, options.window, scale,
                       block_indices);
  }
  return NsaFunction::apply(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, num_selected,
                            ForcedBlocks{num_initial, num_local}, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, Autograd, m) {
  m.impl("nsa_attention", nsa_attention);
  m.impl("nsa_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("nsa_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace nsa
