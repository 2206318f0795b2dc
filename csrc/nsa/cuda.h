// Gates on CUDA, fused: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "host/cuda/params.h"
#include "nsa/operator.h"

namespace nsa::cuda {

// The window branch, and out = sum_b gate_b out_b, by the branch's kernel where it can take that sum. out_win is
// undefined where `keep` is false and nothing needed it.
struct GatedWindow {
  at::Tensor out, out_win, lse_win;
};
GatedWindow gated_window(const NsaInputs& in, const AttentionOptions& options, const at::Tensor& out_cmp,
                         const at::Tensor& out_slc, bool keep);

// One pass over grad_out and the branches' outputs: d gate_b = <dO, out_b>, and what the branches' backwards need of
// it.
struct GateGradients {
  at::Tensor grad_gates;
  std::array<BackwardRows, 3> rows;
};
GateGradients gate_gradients(const at::Tensor& grad_out, const at::Tensor& gates, const std::array<at::Tensor, 3>& outs,
                             const std::array<at::Tensor, 3>& lses);

}  // namespace nsa::cuda
