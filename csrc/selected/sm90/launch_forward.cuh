// Launches of the forward kernel for Hopper, and how many stages it runs with.
#pragma once

#include "selected/cuda/kernels.h"
#include "selected/sm90/forward.cuh"
#include "selected/sm90/launch_union.cuh"

namespace nsa {

// kHeadSlots: 16, 8 where a group has at most 8 heads, or 4. kLong: lists of more than 16 blocks.
template <typename Element, int kDimK, int kDimV, int kHeadSlots, bool kLong,
          int kMostAlone = kDimK == 64 || kHeadSlots == 4 ? 3 : 2,
          selected_sm90::UnionSizes kSizes = selected_sm90::forward_sizes(kDimK, kHeadSlots, kLong)>
using SelectedForwardShapeFor = UnionShape<Element, kDimK, kDimV, false, kSizes.groups, kSizes.stages_k,
                                           kSizes.stages_v, (kHeadSlots < 16), kMostAlone, kHeadSlots>;

template <typename Shape>
void launch_selected_forward_shape(const SelectedForwardParams& selected, cudaStream_t stream) {
  constexpr const char* kName = "selected attention";
  const SelectedForwardSm90Params params{
      .selected = selected,
      .walk = union_params<Shape>(selected.sequences, selected.block_indices, selected.num_selected, selected.q,
                                  selected.k, selected.v, kName)};
  launch_union<Shape>(selected_forward_sm90<Shape>, params, selected.num_selected, group_tokens_of<Shape>(params.walk),
                      stream, kName);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_sm90(const SelectedForwardParams& params, const SelectedForwardPlan& plan,
                                  cudaStream_t stream) {
  using Narrow = SelectedForwardShapeFor<Element, kDimK, kDimV, 16, false>;
  using Long = SelectedForwardShapeFor<Element, kDimK, kDimV, 16, kDimK == 128>;  // elsewhere both fit
  using Wide = SelectedForwardShapeFor<Element, kDimK, kDimV, 8, true>;
  using Widest = SelectedForwardShapeFor<Element, kDimK, kDimV, 4, true>;
  constexpr auto kTile = [](UnionKind kind, int32_t num_selected) {
    return selected_sm90::forward_tile({kDimK, kDimV}, kind, num_selected);
  };
  constexpr int32_t kMost = selected_sm90::kMostSelected;
  static_assert(states_sm90(kTile(UnionKind::kNarrow, 16), union_shared_bytes<Narrow>(12, 16)) &&
                states_sm90(kTile(UnionKind::kLong, kMost), union_shared_bytes<Long>(12, kMost)) &&
                states_sm90(kTile(UnionKind::kWide, kMost), union_shared_bytes<Wide>(24, kMost)) &&
                states_sm90(kTile(UnionKind::kWidest, 16), union_shared_bytes<Widest>(48, 16)));
  static_assert(Wide::kMostBlocks == selected_sm90::kMostBlocks &&
                Widest::kMostBlocks == selected_sm90::kMostWidestBlocks);
  switch (plan.kind) {
    case UnionKind::kNarrow:
      return launch_selected_forward_shape<Narrow>(params, stream);
    case UnionKind::kLong:
      return launch_selected_forward_shape<Long>(params, stream);
    case UnionKind::kWide:
      return launch_selected_forward_shape<Wide>(params, stream);
    case UnionKind::kWidest:
      return launch_selected_forward_shape<Widest>(params, stream);
  }
}

}  // namespace nsa
