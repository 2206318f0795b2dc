// Launches of the tensor-core kernels for one element type and one pair of tile dimensions, and the tile sizes they run
// with.
#pragma once

#include "common/dispatch.h"
#include "common/launch.cuh"
#include "range/sm80/backward_keys.cuh"
#include "range/sm80/backward_query.cuh"
#include "range/sm80/forward.cuh"
#include "range/sm80/launch.h"

namespace nsa {

// Rows of 128 columns leave room for 64 keys a step; wider ones for less.
template <typename Element, int kDimK, int kDimV>
using ForwardShapeFor = std::conditional_t<(kDimK <= 128), RangeForwardShape<Element, kDimK, kDimV, 4, 2, 64>,
                                           RangeForwardShape<Element, kDimK, kDimV, 4, 1, (kDimK <= 192 ? 64 : 32)>>;

template <typename Element, int kDimK, int kDimV>
using BackwardQueryShapeFor =
    RangeBackwardQueryShape<Element, kDimK, kDimV, 4, 1, (kDimK <= 128 ? 64 : 32), (kDimK <= 192 ? 2 : 1)>;

template <typename Element, int kDimK, int kDimV>
using KeyGradientsShapeFor = KeyGradientsShape<Element, kDimK, kDimV, 32, (kDimK <= 192 ? 2 : 1),
                                               (kDimK <= 128   ? 1
                                                : kDimK <= 192 ? 2
                                                               : 4)>;

template <typename Element, int kDimK, int kDimV>
void launch_range_forward_sm80(const RangeForwardParams& params, cudaStream_t stream) {
  using Shape = ForwardShapeFor<Element, kDimK, kDimV>;
  const SequenceLayout& s = params.sequences;
  launch(range_forward_sm80<Shape>, count_slots(s, s.length_q * s.group, Shape::kRows) * s.heads_kv, Shape::kThreads,
         Shape::kSharedBytes, stream, "attention over a range", params);
}

template <typename Element, int kDimK, int kDimV>
void launch_range_backward_query_sm80(const RangeBackwardParams& params, cudaStream_t stream) {
  using Shape = BackwardQueryShapeFor<Element, kDimK, kDimV>;
  const SequenceLayout& s = params.sequences;
  launch(range_backward_query_sm80<Shape>, count_slots(s, s.length_q * s.group, Shape::kRows) * s.heads_kv,
         Shape::kThreads, Shape::kSharedBytes, stream, "gradient of q over a range", params);
}

template <typename Element, int kDimK, int kDimV>
void launch_range_backward_keys_sm80(const RangeBackwardParams& params, cudaStream_t stream) {
  using KeyShape = KeyGradientsShapeFor<Element, kDimK, kDimV>;
  static_assert(KeyShape::kKeys == kKeysPerGradientTile);
  const SequenceLayout& s = params.sequences;
  const int64_t tiles = count_slots(s, params.num_keys, KeyShape::kKeys) * s.heads_kv;
  launch(range_backward_keys_sm80<KeyShape>, tiles * params.splits * KeyShape::kParts, KeyShape::kThreads,
         KeyShape::kSharedBytes, stream, "gradients of k and v over a range", params);
  if (params.splits > 1) {
    launch(range_add_partials_sm80<KeyShape>, tiles, 256, 0, stream, "sums of gradients over a range", params);
  }
}

}  // namespace nsa
