// Launch of the tensor-core kernel for one element type and one width.
#pragma once

#include "common/launch.cuh"
#include "selection/select_sm80.cuh"

namespace nsa {

template <typename Element, int kDim, int kTilesPerQuery>
void launch_select_blocks_of(const SelectBlocksParams& params, cudaStream_t stream) {
  using Shape = SelectShape<Element, kDim, (kDim <= 128 ? 64 : 32), kTilesPerQuery>;
  const Sequences& s = params.sequences;
  launch(select_blocks<Shape>, count_slots(s, s.length_q, Shape::kWarps * Shape::kQueries) * s.heads_kv, Shape::kThreads,
         Shape::kSharedBytes, stream, "select_blocks", params);
}

template <typename Element, int kDim>
void launch_select_blocks_sm80(const SelectBlocksParams& params, cudaStream_t stream) {
  if (params.sequences.group <= 8) {
    launch_select_blocks_of<Element, kDim, 1>(params, stream);
  } else if (params.sequences.group <= 16) {
    launch_select_blocks_of<Element, kDim, 2>(params, stream);
  } else {
    launch_select_blocks_of<Element, kDim, 4>(params, stream);
  }
}

}  // namespace nsa
