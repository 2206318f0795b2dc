// Launches of the kernels for one element type and one pair of tile dimensions. They are defined in
// <machine>/launch*.cuh, which <machine>/instantiations/ compiles.
#pragma once

#include <cuda_runtime_api.h>

#include "range/params.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
struct RangeSm80 {
  static void forward(const RangeForwardParams& params, cudaStream_t stream);
  static void backward_query(const RangeBackwardParams& params, cudaStream_t stream);
  static void backward_keys(const RangeBackwardParams& params, cudaStream_t stream);
};

template <typename Element, int kDimK, int kDimV>
void launch_range_forward_sm90(const RangeForwardParams& params, cudaStream_t stream);
template <typename Element, int kDimK, int kDimV>
void launch_range_backward_query_sm90(const RangeBackwardParams& params, cudaStream_t stream);
template <typename Element, int kDimK, int kDimV>
void launch_range_backward_keys_sm90(const RangeBackwardParams& params, cudaStream_t stream);

}  // namespace nsa
