// Launches of the tensor-core kernels for one element type and one pair of tile dimensions.
#pragma once

#include "decode/cuda/kernels.h"
#include "decode/launch.cuh"
#include "decode/sm80/ranges.cuh"
#include "decode/sm80/selected.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
void DecodeSm80<Element, kDimK, kDimV>::ranges(const DecodeParams& params, const DecodePlan& plan,
                                               cudaStream_t stream) {
  const auto launch_shape = [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(params.all_splits(), params.units(), ceil_div(params.rows(), Shape::kRows));
    launch_in_chain(decode_ranges_sm80<Shape>, grid, Shape::kThreads, plan.launches.of[0].tile, true, stream,
                    "decoding: ranges", params);
  };
  plan.row_tiles == 1 ? launch_shape(DecodeShape<Element, kDimK, kDimV, 1>())
                      : launch_shape(DecodeShape<Element, kDimK, kDimV, 2>());
}

template <typename Element, int kDimK, int kDimV>
void DecodeSm80<Element, kDimK, kDimV>::selected(const DecodeParams& params, const DecodePlan& plan,
                                                 cudaStream_t stream) {
  const auto launch_shape = [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(params.parts, params.units(), params.queries * ceil_div(params.group, Shape::kRows));
    launch_in_chain(decode_selected_sm80<Shape>, grid, Shape::kThreads, plan.launches.of[2].tile, false, stream,
                    "decoding: selected", params);
  };
  plan.part_row_tiles == 1 ? launch_shape(DecodeShape<Element, kDimK, kDimV, 1>())
                           : launch_shape(DecodeShape<Element, kDimK, kDimV, 2>());
}

}  // namespace nsa
