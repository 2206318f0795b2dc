// Launches of the kernels for one element type and one pair of tile dimensions, defined in <machine>/launch*.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "selected/plan.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_sm80(const SelectedForwardParams&, const KernelTile&, cudaStream_t);
template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_sm90(const SelectedForwardParams&, const SelectedForwardPlan&, cudaStream_t);

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_query_sm80(const SelectedBackwardParams&, const KernelTile&, cudaStream_t);
template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_query_sm90(const SelectedBackwardParams&, const SelectedBackwardPlan&, cudaStream_t);

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_sm80(const SelectedBackwardParams&, cudaStream_t);
// Where the plan hands scores over, the gradient of q too.
template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_sm90(const SelectedBackwardParams&, const SelectedBackwardPlan&, cudaStream_t);

}  // namespace nsa
