// Launches of the kernels for Hopper for one element type and one tile dimension: instantiations/ compiles them.
#pragma once

#include <cuda_runtime_api.h>

#include "selection/plan.h"

namespace nsa {

template <typename Element, int kDim>
void launch_select_blocks_sm90(const SelectBlocksParams& params, const SelectBlocksPlan& plan, cudaStream_t stream);

}  // namespace nsa
