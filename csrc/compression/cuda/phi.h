// phi on the GPU: cuBLAS's products on elements of the call's dtype with float32 sums, and kernels (launch.h) between
// them.
#pragma once

#include <ATen/core/Tensor.h>

#include "compression/cpu/phi.h"

namespace nsa::cuda {

// Fills `out`, a contiguous tensor of the result's shape. TypeError for float64.
void phi_forward(const at::Tensor& x, const PhiWeights& weights, int64_t block_size, int64_t block_stride,
                 const Packing& packing, const at::Tensor& out);

// The gradient of x has its dtype, those of the weights are float32 sums that are not rounded yet.
PhiGradients phi_backward(const at::Tensor& grad_out, const at::Tensor& x, const PhiWeights& weights,
                          int64_t block_size, int64_t block_stride, const Packing& packing, const PhiMask& wanted);

}  // namespace nsa::cuda
