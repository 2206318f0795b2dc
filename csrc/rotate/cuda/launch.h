// Rotary position embedding on the GPU: what host code may call.
#pragma once

#include <cuda_runtime_api.h>

#include "rotate/cuda/params.h"

namespace nsa {

void launch_rotate(RotateParams params, ElementType type, cudaStream_t stream);

}  // namespace nsa
