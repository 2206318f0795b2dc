// Launches of the gradient of q for Hopper.
#pragma once

#include "selected/sm90/backward_query.cuh"
#include "selected/sm90/launch.h"
#include "selected/sm90/launch_union.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV, bool kWide, int kMostAlone = 1>
using SelectedBackwardQueryShapeFor = UnionShape<Element, kDimK, kDimV, true, 2,
                                                 (kDimK == 64    ? (kWide ? 12 : 13)
                                                  : kDimK == 128 ? (kWide ? 6 : 7)
                                                                 : 4),
                                                 (kDimK == 64    ? (kWide ? 12 : 13)
                                                  : kDimK == 128 ? (kWide ? 6 : 7)
                                                                 : (kWide ? 3 : 4)),
                                                 kWide, kMostAlone>;

template <typename Shape>
void launch_selected_backward_query_shape(const SelectedBackwardParams& selected, cudaStream_t stream) {
  constexpr const char* kName = "gradient of q of selected attention";
  SelectedBackwardQuerySm90Params params{
      .selected = selected,
      .walk = union_params<Shape>(selected.sequences, selected.block_indices, selected.num_selected, selected.q,
                                  selected.k, selected.v, kName)};
  const SequenceLayout& s = selected.sequences;
  const int32_t tokens = group_tokens_of<Shape>(params.walk);
  params.walk.grad_out = tensor_map(selected.grad_out, kElementType<typename Shape::Element>, s.packed() ? 1 : s.batch,
                                    s.length_q, int64_t{s.heads_kv} * s.group, params.walk.head_slots, tokens, kName);
  launch_union<Shape>(selected_backward_query_sm90<Shape>, params, selected.num_selected, tokens, stream, kName);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_query_sm90(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan,
                                         cudaStream_t stream) {
  using Narrow = SelectedBackwardQueryShapeFor<Element, kDimK, kDimV, false>;
  using Wide = SelectedBackwardQueryShapeFor<Element, kDimK, kDimV, true>;
  static_assert(union_shared_bytes<Narrow>(8, 16) <= kMostUnionSharedBytes &&
                union_shared_bytes<Wide>(16, selected_sm90::kMostSelected) <= kMostUnionSharedBytes);
  if (plan.kind == UnionKind::kNarrow) {
    launch_selected_backward_query_shape<Narrow>(params, stream);
  } else {
    launch_selected_backward_query_shape<Wide>(params, stream);
  }
}

}  // namespace nsa
