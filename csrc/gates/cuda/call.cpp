#include "gates/cuda/call.h"

#include <ATen/Functions.h>

#include "gates/cuda/launch.h"

namespace nsa::cuda {
namespace {

RowCounts row_counts(const at::Tensor& tensor) {
  return {.batch = tensor.dim() == 4 ? tensor.size(0) : 1,
          .tokens = tensor.size(-3),
          .heads = static_cast<int32_t>(tensor.size(-2))};
}

}  // namespace

GatesView gates_view(const at::Tensor& gates) {
  const bool dense = gates.dim() == 4;
  return {.data = gates.data_ptr(),
          .type = element_type("gates", gates),
          .batch_stride = dense ? gates.stride(0) : 0,
          .token_stride = gates.stride(-3),
          .head_stride = gates.stride(-2),
          .branch_stride = gates.stride(-1)};
}

void combine_gates(const at::Tensor& gates, const std::array<at::Tensor, 3>& outs, const at::Tensor& out) {
  if (out.numel() == 0) {
    return;
  }
  CombineGatesParams params{.rows = row_counts(out), .gates = gates_view(gates), .outs = {}, .out = view_of(out)};
  for (size_t b = 0; b < outs.size(); ++b) {
    params.outs[b] = view_of(outs[b]);
  }
  launch_combine_gates(params, element_type("q", out), c10::cuda::getCurrentCUDAStream());
}

GateGradients gate_gradients(const at::Tensor& grad_out, const at::Tensor& gates, const std::array<at::Tensor, 3>& outs,
                             const std::array<at::Tensor, 3>& lses) {
  const c10::cuda::CUDAGuard guard(grad_out.device());
  GateGradients result;
  result.grad_gates = at::empty(gates.sizes(), gates.options());
  for (size_t b = 0; b < outs.size(); ++b) {
    result.rows[b] = {lses[b].contiguous(),
                      at::empty(lses[b].sizes(), lses[b].options()),
                      at::empty(lses[b].sizes(), lses[b].options()),
                      {}};
  }
  if (grad_out.numel() == 0) {
    result.grad_gates.zero_();
    return result;
  }
  const at::Tensor grad_out_read = unit_stride(grad_out);
  std::array<at::Tensor, 3> outs_read;
  GateGradientsParams params{.rows = row_counts(grad_out),
                             .gates = gates_view(gates),
                             .grad_out = view_of(grad_out_read),
                             .outs = {},
                             .grad_gates = gates_view(result.grad_gates),
                             .deltas = {},
                             .scales = {}};
  for (size_t b = 0; b < outs.size(); ++b) {
    outs_read[b] = unit_stride(outs[b]);
    params.outs[b] = view_of(outs_read[b]);
    params.deltas[b] = rows_of(result.rows[b].delta);
    params.scales[b] = rows_of(result.rows[b].gate);
  }
  launch_gate_gradients(params, element_type("grad_out", grad_out), c10::cuda::getCurrentCUDAStream());
  return result;
}

BackwardRows backward_rows(const at::Tensor& grad_out, const at::Tensor& out, const at::Tensor& lse,
                           const OptionalTensor& grad_lse) {
  const c10::cuda::CUDAGuard guard(grad_out.device());
  const at::Tensor delta = at::empty(lse.sizes(), lse.options());
  if (grad_out.numel() == 0) {
    return {lse.contiguous(), delta.zero_(), {}, {}};
  }
  const at::Tensor grad_out_read = unit_stride(grad_out);
  const at::Tensor out_read = unit_stride(out);
  const at::Tensor grad_lse_read = grad_lse.has_value() ? grad_lse->contiguous() : at::Tensor();
  const DeltaParams params{.rows = row_counts(grad_out),
                           .grad_out = view_of(grad_out_read),
                           .out = view_of(out_read),
                           .grad_lse = rows_of(grad_lse_read),
                           .delta = rows_of(delta)};
  launch_delta(params, element_type("grad_out", grad_out), c10::cuda::getCurrentCUDAStream());
  return {lse.contiguous(), delta, {}, grad_lse_read};
}

}  // namespace nsa::cuda
