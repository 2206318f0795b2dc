// Gates on CUDA, and what a backward is told of its rows: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "host/cuda/params.h"

namespace nsa::cuda {

GatesView gates_view(const at::Tensor& gates);

// out = sum_b gate_b out_b
void combine_gates(const at::Tensor& gates, const std::array<at::Tensor, 3>& outs, const at::Tensor& out);

// What a backward over a range or over listed blocks is told of its rows: (B, H, T) or packed (H, sum T), float32.
struct BackwardRows {
  at::Tensor lse;
  at::Tensor delta;     // <grad_out, out>, less the gradient of lse where there is no gate
  at::Tensor gate;      // the factor of grad_out, or undefined: 1
  at::Tensor grad_lse;  // what delta holds of it, or undefined: 0
};

// Those of an op of one branch, which has no gate.
BackwardRows backward_rows(const at::Tensor& grad_out, const at::Tensor& out, const at::Tensor& lse,
                           const OptionalTensor& grad_lse);

// Those of all three branches, and d gate_b = <dO, out_b>, by one pass over grad_out and the branches' outputs.
struct GateGradients {
  at::Tensor grad_gates;
  std::array<BackwardRows, 3> rows;
};
GateGradients gate_gradients(const at::Tensor& grad_out, const at::Tensor& gates, const std::array<at::Tensor, 3>& outs,
                             const std::array<at::Tensor, 3>& lses);

}  // namespace nsa::cuda
