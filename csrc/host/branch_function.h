// The autograd Function of a branch: (q, k, v) -> (out, lse), both differentiable. `Branch` names the two ops: static
// forward(q, k, v, options) and backward(grad_out, grad_lse, q, k, v, out, lse, output_mask, options), through the
// dispatcher.
#pragma once

#include <ATen/Functions.h>

#include "host/autograd.h"
#include "host/options.h"

namespace nsa {

inline void save_options(torch::autograd::AutogradContext* ctx, const AttentionOptions& options) {
  auto& saved = ctx->saved_data;
  saved["branch"] = static_cast<int64_t>(options.branch);
  saved["seqlen_k"] = options.seqlen_k;
  saved["block_size"] = options.block_size;
  saved["block_stride"] = options.block_stride;
  saved["select_size"] = options.select_size;
  saved["window"] = options.window;
  saved["scale"] = options.scale;
  saved["max_seqlen_q"] = options.packing.max_seqlen_q;
  saved["max_seqlen_k"] = options.packing.max_seqlen_k;
}

// The tensors among the options are saved with the others: block_indices, cu_seqlens_q, cu_seqlens_k, seqused_k.
inline std::vector<OptionalTensor> option_tensors(const AttentionOptions& options) {
  return {options.block_indices, options.packing.cu_seqlens_q, options.packing.cu_seqlens_k, options.packing.seqused_k};
}

inline AttentionOptions load_options(torch::autograd::AutogradContext* ctx, const OptionalTensor* tensors) {
  auto& saved = ctx->saved_data;
  return {
      .branch = static_cast<Branch>(saved["branch"].toInt()),
      .seqlen_k = load_optional_int(ctx, "seqlen_k"),
      .block_size = saved["block_size"].toInt(),
      .block_stride = saved["block_stride"].toInt(),
      .select_size = saved["select_size"].toInt(),
      .window = saved["window"].toSymInt(),
      .scale = saved["scale"].toOptional<double>(),
      .block_indices = tensors[0],
      .packing = {tensors[1], tensors[2], load_optional_int(ctx, "max_seqlen_q"),
                  load_optional_int(ctx, "max_seqlen_k"), tensors[3]},
  };
}

template <typename Branch>
class BranchFunction : public torch::autograd::Function<BranchFunction<Branch>> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q,
                                                const at::Tensor& k, const at::Tensor& v,
                                                const AttentionOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [out, lse] = Branch::forward(q, k, v, options);
    std::vector<OptionalTensor> saved{q, k, v, out, lse};
    const std::vector<OptionalTensor> of_options = option_tensors(options);
    saved.insert(saved.end(), of_options.begin(), of_options.end());
    save_tensors(ctx, saved);
    save_options(ctx, options);
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const std::vector<OptionalTensor> saved = load_tensors(ctx);
    if (!grads[0].defined() && !grads[1].defined()) {
      return {{}, {}, {}, {}};
    }
    const at::Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(*saved[3]);
    const GradientMask mask = needed_gradients<3>(ctx);
    auto [dq, dk, dv] = Branch::backward(grad_out, if_defined(grads[1]), *saved[0], *saved[1], *saved[2], *saved[3],
                                         *saved[4], mask, load_options(ctx, &saved[5]));
    return {if_needed(dq, mask[0]), if_needed(dk, mask[1]), if_needed(dv, mask[2]), {}};
  }
};

template <typename Branch>
OutAndLse apply_branch(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options) {
  const torch::autograd::variable_list results = BranchFunction<Branch>::apply(q, k, v, options);
  return {results[0], results[1]};
}

}  // namespace nsa
