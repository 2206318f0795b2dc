// Launches of the tensor-core kernels for one element type and one pair of tile dimensions, and the tile sizes they run
// with.
#pragma once

#include "common/dispatch.h"
#include "common/launch.cuh"
#include "selected/cuda/kernels.h"
#include "selected/sm80/backward_keys.cuh"
#include "selected/sm80/backward_query.cuh"
#include "selected/sm80/forward.cuh"

namespace nsa {

// Calls with the shape that has the stages of the plan's tile.
template <typename Element, int kDimK, int kDimV, typename Launch>
void with_stages(const KernelTile& tile, const Launch& launch_shape) {
  if constexpr (selected_sm80::least_stages({kDimK, kDimV}) == 1) {
    if (tile.stages == 1) {
      return launch_shape(TokenShape<Element, kDimK, kDimV, 1>());
    }
  }
  launch_shape(TokenShape<Element, kDimK, kDimV, selected_sm80::kMostStages>());
}

template <typename Kernel, typename Params>
void launch_per_token(Kernel kernel, const KernelTile& tile, cudaStream_t stream, const char* name,
                      const Params& params) {
  const SequenceLayout& s = params.sequences;
  const int64_t tokens = s.packed() ? s.length_q : s.batch * s.length_q;
  launch(kernel, tokens * s.heads_kv * ceil_div(s.group, selected_sm80::kRows), kTokenThreads, tile.dynamic_bytes,
         stream, name, params);
}

template <typename Element, int kDimK, int kDimV>
void SelectedSm80<Element, kDimK, kDimV>::forward(const SelectedForwardParams& params, const KernelTile& tile,
                                                  cudaStream_t stream) {
  with_stages<Element, kDimK, kDimV>(tile, [&](auto shape) {
    launch_per_token(selected_forward_sm80<decltype(shape)>, tile, stream, "selected attention", params);
  });
}

template <typename Element, int kDimK, int kDimV>
void SelectedSm80<Element, kDimK, kDimV>::backward_query(const SelectedBackwardParams& params, const KernelTile& tile,
                                                         cudaStream_t stream) {
  with_stages<Element, kDimK, kDimV>(tile, [&](auto shape) {
    launch_per_token(selected_backward_query_sm80<decltype(shape)>, tile, stream, "gradient of q of selected attention",
                     params);
  });
}

template <typename Element, int kDimK, int kDimV>
void SelectedSm80<Element, kDimK, kDimV>::backward_keys(const SelectedBackwardParams& params, cudaStream_t stream) {
  using KeyShape = KeyGradientsShapeFor<Element, kDimK, kDimV>;
  const int64_t tiles = ceil_div(params.select_size, KeyShape::kKeys);
  launch(selected_backward_keys_sm80<KeyShape>, params.chosen_by.max_segments * tiles * KeyShape::kParts,
         KeyShape::kThreads, key_gradients_sm80::tile({kDimK, kDimV}).dynamic_bytes, stream,
         "gradients of k and v of selected attention", params);
  if (params.chosen_by.full_segments > 0) {
    launch(selected_add_partials_sm80<KeyShape>, params.chosen_by.blocks * tiles, 256, 0, stream,
           "sums of gradients of selected attention", params);
  }
}

}  // namespace nsa
