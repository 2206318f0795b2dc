// Attention over a range of keys on the GPU: what host code may call.
#pragma once

#include <cuda_runtime_api.h>

#include "range/plan.h"

namespace nsa {

// Launch what the plan says. For kernels of 16-bit elements rows of every tensor start at multiples of 16 bytes, and
// widths are multiples of 8; for float32 any strides will do whose last is 1. Head dimensions are at most 256.
void launch_range_forward(const RangeForwardParams& params, const RangeForwardPlan& plan, ElementType type,
                          cudaStream_t stream);
void launch_range_backward(const RangeBackwardParams& params, const RangeBackwardPlan& plan, ElementType type,
                           cudaStream_t stream);

// In float32 (range/plain/). The backward writes all of grad_q, grad_k and grad_v, also where nobody sees a key; it
// needs no splits and no partials.
void launch_range_forward_plain(const RangeForwardParams& params, cudaStream_t stream);
void launch_range_backward_plain(const RangeBackwardParams& params, NeededGradients needed, cudaStream_t stream);

}  // namespace nsa
