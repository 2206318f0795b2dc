// Launches of the gradient of q for Hopper.
#pragma once

#include "selected/cuda/kernels.h"
#include "selected/sm90/backward_query.cuh"
#include "selected/sm90/launch_union.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV, bool kWide, int kMostAlone = 1,
          selected_sm90::UnionSizes kSizes = selected_sm90::query_sizes(kDimK, kWide)>
using SelectedBackwardQueryShapeFor =
    UnionShape<Element, kDimK, kDimV, true, kSizes.groups, kSizes.stages_k, kSizes.stages_v, kWide, kMostAlone>;

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
  constexpr auto kTile = [](UnionKind kind, int32_t num_selected) {
    return selected_sm90::backward_query_tile({kDimK, kDimV}, kind, 1, num_selected);
  };
  constexpr int32_t kMost = selected_sm90::kMostSelected;
  static_assert(states_sm90(kTile(UnionKind::kNarrow, 16), union_shared_bytes<Narrow>(8, 16)) &&
                states_sm90(kTile(UnionKind::kWide, kMost), union_shared_bytes<Wide>(16, kMost)));
  if (plan.kind == UnionKind::kNarrow) {
    launch_selected_backward_query_shape<Narrow>(params, stream);
  } else {
    launch_selected_backward_query_shape<Wide>(params, stream);
  }
}

}  // namespace nsa
