// Launches of the tensor-core kernels for one element type and one pair of tile dimensions, and the tile sizes they run
// with.
#pragma once

#include "common/dispatch.h"
#include "common/launch.cuh"
#include "selected/sm80/backward_keys.cuh"
#include "selected/sm80/backward_query.cuh"
#include "selected/sm80/forward.cuh"
#include "selected/sm80/launch.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
using SelectedKeysShapeFor = KeyGradientsShape<Element, kDimK, kDimV, 32, (kDimK <= 192 ? 2 : 1),
                                               (kDimK <= 128   ? 1
                                                : kDimK <= 192 ? 2
                                                               : 4)>;

template <typename Kernel, typename Params>
void launch_per_token(Kernel kernel, int threads, int64_t shared_bytes, cudaStream_t stream, const char* name,
                      const Params& params) {
  const SequenceLayout& s = params.sequences;
  const int64_t tokens = s.packed() ? s.length_q : s.batch * s.length_q;
  launch(kernel, tokens * s.heads_kv * ceil_div(s.group, 16), threads, shared_bytes, stream, name, params);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_sm80(const SelectedForwardParams& params, cudaStream_t stream) {
  using Shape = TokenShape<Element, kDimK, kDimV, 2>;
  launch_per_token(selected_forward_sm80<Shape>, Shape::kThreads,
                   selected_forward_shared_bytes<Shape>(params.num_selected), stream, "selected attention", params);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_query_sm80(const SelectedBackwardParams& params, cudaStream_t stream) {
  using Shape = TokenShape<Element, kDimK, kDimV, 2>;
  launch_per_token(selected_backward_query_sm80<Shape>, Shape::kThreads,
                   selected_backward_query_shared_bytes<Shape>(params.num_selected), stream,
                   "gradient of q of selected attention", params);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_sm80(const SelectedBackwardParams& params, cudaStream_t stream) {
  using KeyShape = SelectedKeysShapeFor<Element, kDimK, kDimV>;
  static_assert(KeyShape::kKeys == kKeysPerGradientTile);
  const int64_t tiles = ceil_div(params.select_size, KeyShape::kKeys);
  launch(selected_backward_keys_sm80<KeyShape>, params.chosen_by.max_segments * tiles * KeyShape::kParts,
         KeyShape::kThreads, KeyShape::kSharedBytes, stream, "gradients of k and v of selected attention", params);
  if (params.chosen_by.full_segments > 0) {
    launch(selected_add_partials_sm80<KeyShape>, params.chosen_by.blocks * tiles, 256, 0, stream,
           "sums of gradients of selected attention", params);
  }
}

}  // namespace nsa
