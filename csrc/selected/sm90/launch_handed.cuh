// Launches of Hopper's backward over listed blocks in which the kernel of the gradients of k and v hands the gradients
// of scores to that of the gradient of q.
#pragma once

#include "selected/cuda/kernels.h"
#include "selected/sm90/backward_query_handed.cuh"
#include "selected/sm90/launch_backward_keys.cuh"
#include "selected/sm90/launch_union.cuh"

namespace nsa {

template <typename Element, int kDimK, bool kWide,
          selected_sm90::UnionSizes kSizes = selected_sm90::handed_sizes(kDimK, kWide)>
using SelectedHandedShape = HandedShape<Element, kDimK, kSizes.groups, kSizes.stages_k, kWide, 2>;

// The gradient of q of the heads that were handed over.
template <typename Shape>
void launch_selected_query_handed_shape(const SelectedBackwardParams& selected, cudaStream_t stream) {
  constexpr const char* kName = "gradient of q of selected attention";
  SelectedQueryHandedSm90Params params{
      .selected = selected,
      .walk = union_params<Shape>(selected.sequences, selected.block_indices, selected.num_selected, selected.q,
                                  selected.k, selected.v, kName),
      .block_units = HandedScores::units(selected.sequences.group),
      .key_units = HandedScores::key_units(selected.sequences.group)};
  const int32_t of_head = params.walk.tiles / selected.sequences.heads_kv;
  params.walk.first_tile = of_head * selected.handed.first_head;
  params.walk.end_tile = params.walk.first_tile + of_head * selected.handed.heads;
  launch_union<Shape>(selected_query_handed_sm90<Shape>, params, selected.num_selected,
                      group_tokens_of<Shape>(params.walk), stream, kName);
}

// All gradients. `all.handed` says where scores go, and of how many heads at a time.
template <typename KeysShape, typename NarrowShape, typename WideShape>
void launch_selected_backward_handed_shapes(const SelectedBackwardParams& all, const SelectedBackwardPlan& plan,
                                            cudaStream_t stream) {
  const SequenceLayout& s = all.sequences;
  constexpr auto kTile = [](UnionKind kind, int32_t num_selected) {
    return selected_sm90::handed_tile({KeysShape::kDimK, KeysShape::kDimV}, kind, 1, num_selected);
  };
  constexpr int32_t kMost = selected_sm90::kMostSelected;
  static_assert(
      states_sm90(kTile(UnionKind::kNarrow, 16), union_shared_bytes<NarrowShape>(4 * NarrowShape::kGroups, 16)) &&
      states_sm90(kTile(UnionKind::kWide, kMost), union_shared_bytes<WideShape>(8 * WideShape::kGroups, kMost)));
  SelectedBackwardParams selected = all;
  selected.handed.queries = s.packed() ? s.length_q : s.batch * s.length_q;
  for (int32_t head = 0; head < s.heads_kv; head += plan.handed_heads) {
    selected.handed.first_head = head;
    selected.handed.heads = static_cast<int32_t>(min_of(plan.handed_heads, s.heads_kv - head));
    launch_selected_backward_keys_heads<KeysShape>(selected, head, selected.handed.heads, stream);
    if (plan.kind == UnionKind::kNarrow) {
      launch_selected_query_handed_shape<NarrowShape>(selected, stream);
    } else {
      launch_selected_query_handed_shape<WideShape>(selected, stream);
    }
  }
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_sm90(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan,
                                        cudaStream_t stream) {
  using KeysShape = SelectedKeysSm90Shape<Element, kDimK, kDimV>;
  if (plan.handed_heads > 0) {
    launch_selected_backward_handed_shapes<KeysShape, SelectedHandedShape<Element, kDimK, false>,
                                           SelectedHandedShape<Element, kDimK, true>>(params, plan, stream);
  } else {
    launch_selected_backward_keys_shape<KeysShape>(params, plan.keys_heads, stream);
  }
}

}  // namespace nsa
