// Launches of the portable kernels for one element type and one pair of tile dimensions: instantiations/ compiles them.
#pragma once

#include <cuda_runtime_api.h>

#include "selected/params.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_sm80(const SelectedForwardParams& params, cudaStream_t stream);
template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_query_sm80(const SelectedBackwardParams& params, cudaStream_t stream);
template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_sm80(const SelectedBackwardParams& params, cudaStream_t stream);

}  // namespace nsa
