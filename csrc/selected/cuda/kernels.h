// Launches of the kernels for one element type and one pair of tile dimensions, defined in <machine>/launch*.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "selected/plan.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
struct SelectedSm80 {
  static void forward(const SelectedForwardParams&, const KernelTile&, cudaStream_t);
  static void backward_query(const SelectedBackwardParams&, const KernelTile&, cudaStream_t);
  static void backward_keys(const SelectedBackwardParams&, cudaStream_t);
};

template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_sm90(const SelectedForwardParams&, const SelectedForwardPlan&, cudaStream_t);

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_query_sm90(const SelectedBackwardParams&, const SelectedBackwardPlan&, cudaStream_t);
// Where the plan hands scores over, the gradient of q too.
template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_sm90(const SelectedBackwardParams&, const SelectedBackwardPlan&, cudaStream_t);

}  // namespace nsa
