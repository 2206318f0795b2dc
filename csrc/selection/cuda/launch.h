// The choice of blocks on the GPU: what host code may call.
#pragma once

#include <cuda_runtime_api.h>

#include "selection/plan.h"

namespace nsa {

// Launches what the plan says. float16 and bfloat16: rows of q and k start at multiples of 16 bytes, and widths are
// multiples of 8. float32: any strides whose last is 1. Head dimensions up to 256.
void launch_select_blocks(const SelectBlocksParams& params, const SelectBlocksPlan& plan, ElementType type,
                          cudaStream_t stream);
void launch_select_blocks_plain(const SelectBlocksParams& params, cudaStream_t stream);

}  // namespace nsa
