// Launches of the kernels for Hopper for one element type and one pair of tile dimensions: instantiations/ compiles
// them.
#pragma once

#include <cuda_runtime_api.h>

#include "range/params.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
void launch_range_forward_sm90(const RangeForwardParams& params, cudaStream_t stream);
template <typename Element, int kDimK, int kDimV>
void launch_range_backward_query_sm90(const RangeBackwardParams& params, cudaStream_t stream);
template <typename Element, int kDimK, int kDimV>
void launch_range_backward_keys_sm90(const RangeBackwardParams& params, cudaStream_t stream);

}  // namespace nsa
