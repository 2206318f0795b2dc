// Launches of the tensor-core kernels for one element type and one pair of tile dimensions, and the tile sizes they run
// with.
#pragma once

#include "common/dispatch.h"
#include "common/launch.cuh"
#include "range/cuda/kernels.h"
#include "range/sm80/backward_keys.cuh"
#include "range/sm80/backward_query.cuh"
#include "range/sm80/forward.cuh"
#include "range/tiles.h"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
using ForwardShapeFor = RangeForwardShape<Element, kDimK, kDimV, range_sm80::kWarps, range_sm80::row_tiles(kDimK),
                                          range_sm80::forward_keys(kDimK)>;

template <typename Element, int kDimK, int kDimV>
using BackwardQueryShapeFor = RangeBackwardQueryShape<Element, kDimK, kDimV, range_sm80::kWarps, 1,
                                                      range_sm80::query_keys(kDimK), range_sm80::query_stages(kDimK)>;

template <typename Element, int kDimK, int kDimV>
void RangeSm80<Element, kDimK, kDimV>::forward(const RangeForwardParams& params, cudaStream_t stream) {
  using Shape = ForwardShapeFor<Element, kDimK, kDimV>;
  const SequenceLayout& s = params.sequences;
  launch(range_forward_sm80<Shape>, count_slots(s, s.length_q * s.group, Shape::kRows) * s.heads_kv, Shape::kThreads,
         range_sm80::forward_tile({kDimK, kDimV}).dynamic_bytes, stream, "attention over a range", params);
}

template <typename Element, int kDimK, int kDimV>
void RangeSm80<Element, kDimK, kDimV>::backward_query(const RangeBackwardParams& params, cudaStream_t stream) {
  using Shape = BackwardQueryShapeFor<Element, kDimK, kDimV>;
  const SequenceLayout& s = params.sequences;
  launch(range_backward_query_sm80<Shape>, count_slots(s, s.length_q * s.group, Shape::kRows) * s.heads_kv,
         Shape::kThreads, range_sm80::backward_query_tile({kDimK, kDimV}).dynamic_bytes, stream,
         "gradient of q over a range", params);
}

template <typename Element, int kDimK, int kDimV>
void RangeSm80<Element, kDimK, kDimV>::backward_keys(const RangeBackwardParams& params, cudaStream_t stream) {
  using KeyShape = KeyGradientsShapeFor<Element, kDimK, kDimV>;
  const SequenceLayout& s = params.sequences;
  const int64_t tiles = count_slots(s, params.num_keys, KeyShape::kKeys) * s.heads_kv;
  launch(range_backward_keys_sm80<KeyShape>, tiles * params.splits * KeyShape::kParts, KeyShape::kThreads,
         key_gradients_sm80::tile({kDimK, kDimV}).dynamic_bytes, stream, "gradients of k and v over a range", params);
  if (params.splits > 1) {
    launch(range_add_partials_sm80<KeyShape>, tiles, 256, 0, stream, "sums of gradients over a range", params);
  }
}

}  // namespace nsa
