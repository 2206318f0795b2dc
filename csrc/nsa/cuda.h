// Gates on CUDA, fused: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "host/cuda/params.h"

namespace nsa::cuda {

// sum_b gate_b out_b, in the outputs' dtype.
at::Tensor combine_gates(const at::Tensor& gates, const std::array<at::Tensor, 3>& outs);

// One pass over grad_out and the branches' outputs: d gate_b = <dO, out_b>, and what the branches' backwards need of
// it.
struct GateGradients {
  at::Tensor grad_gates;
  std::array<BackwardRows, 3> rows;
};
GateGradients gate_gradients(const at::Tensor& grad_out, const at::Tensor& gates, const std::array<at::Tensor, 3>& outs,
                             const std::array<at::Tensor, 3>& lses);

}  // namespace nsa::cuda
