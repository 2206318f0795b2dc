// Launches of the portable kernels for one element type and one tile dimension: instantiations/ compiles them.
#pragma once

#include <cuda_runtime_api.h>

#include "selection/params.h"

namespace nsa {

template <typename Element, int kDim>
void launch_select_blocks_sm80(const SelectBlocksParams& params, cudaStream_t stream);

}  // namespace nsa
