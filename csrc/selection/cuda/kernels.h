// Launches of the kernels for one element type and one tile dimension, defined in <machine>/launch.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "selection/plan.h"

namespace nsa {

template <typename Element, int kDim>
void launch_select_blocks_sm80(const SelectBlocksParams& params, cudaStream_t stream);
template <typename Element, int kDim>
void launch_select_blocks_sm90(const SelectBlocksParams& params, const SelectBlocksPlan& plan, cudaStream_t stream);

}  // namespace nsa
