// Attention over listed blocks on the GPU: what host code may call.
#pragma once

#include <cuda_runtime_api.h>

#include "selected/plan.h"

namespace nsa {

// Launch what the plan says. For kernels of 16-bit elements rows of every tensor start at multiples of 16 bytes, and
// widths are multiples of 8; for float32 any strides will do whose last is 1. Head dimensions are at most 256.
void launch_selected_forward(const SelectedForwardParams& params, const SelectedForwardPlan& plan, ElementType type,
                             cudaStream_t stream);
void launch_selected_backward(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan, ElementType type,
                              cudaStream_t stream);

// In float32 (selected/plain/). The backward writes all of grad_q, grad_k and grad_v, also where nobody sees a key. Of
// chosen_by it reads queries and begins; it needs no partials.
void launch_selected_forward_plain(const SelectedForwardParams& params, cudaStream_t stream);
void launch_selected_backward_plain(const SelectedBackwardParams& params, NeededGradients needed, cudaStream_t stream);

// Turning the lists round. The caller allocates what InvertListsParams points at.
int64_t invert_lists_temporary_bytes(int64_t pairs, int64_t blocks);
void launch_invert_lists(const InvertListsParams& params, cudaStream_t stream);

}  // namespace nsa
