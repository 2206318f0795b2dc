// Launches of the kernels for one element type and one pair of tile dimensions, defined in sm80/launch.cuh and
// sm90/launch.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "decode/plan.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
struct DecodeSm80 {
  static void ranges(const DecodeParams& params, const DecodePlan& plan, cudaStream_t stream);
  static void selected(const DecodeParams& params, const DecodePlan& plan, cudaStream_t stream);
};

template <typename Element, int kDimK, int kDimV>
struct DecodeSm90 {
  static void ranges(const DecodeParams& params, const DecodePlan& plan, cudaStream_t stream);
  static void selected(const DecodeParams& params, const DecodePlan& plan, cudaStream_t stream);
};

}  // namespace nsa
