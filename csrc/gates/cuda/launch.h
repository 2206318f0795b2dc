// Gates, their gradients, and the deltas of backward kernels on the GPU: what host code may call. `type` is that of all
// tensors but the gates and their gradients.
#pragma once

#include <cuda_runtime_api.h>

#include "gates/cuda/params.h"

namespace nsa {

// out = sum_b gate_b out_b
void launch_combine_gates(const CombineGatesParams& params, ElementType type, cudaStream_t stream);
// d gate_b = <dO, out_b>,  delta_b = d gate_b in float32,  scale_b = gate_b
void launch_gate_gradients(const GateGradientsParams& params, ElementType type, cudaStream_t stream);
// delta = <dO, out> - d lse
void launch_delta(const DeltaParams& params, ElementType type, cudaStream_t stream);

}  // namespace nsa
