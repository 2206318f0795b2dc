// Rotary position embedding on CUDA: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

namespace nsa::cuda {

// x (B, T, H, D) or packed (sum T, H, D); cos and sin have its dimensions, heads of size 1. `out` is contiguous.
void rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed, const at::Tensor& out);

}  // namespace nsa::cuda
