// Launches of Hopper's kernels for one element type and one pair of tile dimensions.
#pragma once

#include "decode/cuda/kernels.h"
#include "decode/launch.cuh"
#include "decode/sm90/ranges.cuh"
#include "decode/sm90/selected.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
void DecodeSm90<Element, kDimK, kDimV>::ranges(const DecodeParams& params, const DecodePlan& plan,
                                               cudaStream_t stream) {
  const auto launch_shape = [&](auto tiles) {
    constexpr int kStages = decode_sm90::range_stages({kDimK, kDimV}, tiles);
    using Shape = StageShape<Element, kDimK, kDimV, tiles, kStages>;
    static_assert(
        states_sm90(decode_sm90::ranges_tile({kDimK, kDimV}, tiles), round_up(sizeof(RangesShared<Shape>), 128)));
    const dim3 grid(static_cast<unsigned>(params.range_blocks));
    launch_in_chain(decode_ranges_sm90<Shape>, grid, decode_sm90::kRangesThreads, plan.launches.of[0].tile, true,
                    stream, "decoding: ranges", params);
  };
  if (plan.row_tiles == 1) {
    launch_shape(std::integral_constant<int, 1>());
  } else if (plan.row_tiles == 2) {
    launch_shape(std::integral_constant<int, 2>());
  } else if constexpr (decode_sm90::most_row_tiles({kDimK, kDimV}) == 4) {
    launch_shape(std::integral_constant<int, 4>());
  }
}

template <typename Element, int kDimK, int kDimV>
void DecodeSm90<Element, kDimK, kDimV>::selected(const DecodeParams& params, const DecodePlan& plan,
                                                 cudaStream_t stream) {
  const auto launch_shape = [&](auto tiles) {
    using Shape = StageShape<Element, kDimK, kDimV, tiles, decode_sm90::selected_stages({kDimK, kDimV})>;
    static_assert(
        states_sm90(decode_sm90::selected_tile({kDimK, kDimV}, tiles), round_up(sizeof(ChosenShared<Shape>), 128)));
    const dim3 grid(static_cast<unsigned>(params.cluster), static_cast<unsigned>(params.units()),
                    static_cast<unsigned>(params.queries));
    launch_in_chain(decode_selected_sm90<Shape>, grid, Shape::kThreads, plan.launches.of[1].tile, false, stream,
                    "decoding: selected", params, params.cluster);
  };
  plan.part_row_tiles == 1 ? launch_shape(std::integral_constant<int, 1>())
                           : launch_shape(std::integral_constant<int, 2>());
}

}  // namespace nsa
