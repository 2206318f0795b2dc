// Launches of the kernels for Hopper for one element type and one pair of tile dimensions: instantiations/ compiles
// them.
#pragma once

#include <cuda_runtime_api.h>

#include "selected/plan.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_sm90(const SelectedForwardParams& params, const SelectedForwardPlan& plan,
                                  cudaStream_t stream);
template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_query_sm90(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan,
                                         cudaStream_t stream);
template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_sm90(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan,
                                        cudaStream_t stream);
// All gradients: the kernel of those of k and v hands the gradients of scores to that of the gradient of q.
template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_handed_sm90(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan,
                                          cudaStream_t stream);

}  // namespace nsa
