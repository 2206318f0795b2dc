// Launches of the tensor-core kernels for one element type and one tile dimension.
#pragma once

#include "common/launch.cuh"
#include "selection/cuda/kernels.h"
#include "selection/sm80/select.cuh"

namespace nsa {

template <typename Shape>
void launch_select_shape(const SelectBlocksParams& params, cudaStream_t stream) {
  const SequenceLayout& s = params.sequences;
  const int64_t queries = Shape::kWarps * Shape::kQueries / ceil_div(s.group, kHeadsPerWarp);
  launch(select_blocks_sm80<Shape>, count_slots(s, s.length_q, queries) * s.heads_kv, Shape::kThreads,
         select_sm80::tile(Shape::kDim, Shape::kQueries).dynamic_bytes, stream, "choice of blocks", params);
}

template <typename Element, int kDim>
void launch_select_blocks_sm80(const SelectBlocksParams& params, cudaStream_t stream) {
  switch (select_sm80::queries(params.sequences.group)) {
    case 4:
      return launch_select_shape<SelectShape<Element, kDim, 4>>(params, stream);
    case 2:
      return launch_select_shape<SelectShape<Element, kDim, 2>>(params, stream);
    default:
      return launch_select_shape<SelectShape<Element, kDim, 1>>(params, stream);
  }
}

}  // namespace nsa
