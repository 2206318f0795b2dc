#include "nsa/cuda/call.h"

#include <ATen/Functions.h>

#include "host/results.h"
#include "range/cuda/call.h"

namespace nsa::cuda {

GatedWindow gated_window(const NsaInputs& in, const AttentionOptions& options, const at::Tensor& out_cmp,
                         const at::Tensor& out_slc, bool keep) {
  const c10::cuda::CUDAGuard guard(in.q.device());
  AttentionOptions of_window = options;
  of_window.branch = Branch::kWindow;
  auto [out, lse] = empty_results(in.q, in.v_win);
  const at::Tensor kept = keep ? at::empty(out.sizes(), out.options()) : at::Tensor();
  const auto [out_win, sum_taken] = range_attention_forward(in.q, in.k_win, in.v_win, of_window, kept, lse,
                                                            {gates_view(in.gates), {out_cmp, out_slc}, out});
  if (!sum_taken) {
    combine_gates(in.gates, {out_cmp, out_slc, out_win}, out);
    fill_unused_rows(options.packing, {{out}});
  }
  return {.out = out, .out_win = out_win, .lse_win = lse};
}

}  // namespace nsa::cuda
