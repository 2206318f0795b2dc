// A decoding step on the GPU: what host code may call.
#pragma once

#include <cuda_runtime_api.h>

#include "decode/plan.h"

namespace nsa {

// Launches what the plan says, for a workspace that is placed.
void launch_decode(const DecodeParams& params, const DecodePlan& plan, ElementType type, cudaStream_t stream);

}  // namespace nsa
