// Launches of the forward kernel for Hopper, which calls it takes, and how many stages it runs with.
#pragma once

#include "selected/forward_sm90.cuh"
#include "selected/launch_union_sm90.cuh"

namespace nsa {

// Whether these tensors suit the kernel; others run on the sm_80 kernel.
inline bool selected_forward_fits_sm90(const SelectedForwardParams& params) {
  return params.scale != 0.f &&
         union_fits_sm90(params.sequences, params.select_size, params.num_selected, params.q, params.k, params.v);
}

// kHeadSlots: 16, 8 where a group has at most 8 heads, or 4. kLong: lists of more than 16 blocks.
template <typename Element, int kDimK, int kDimV, int kHeadSlots, bool kLong,
          int kMostAlone = kDimK == 64 || kHeadSlots == 4 ? 3 : 2>
using SelectedForwardShapeFor = UnionShape < Element,
      kDimK, kDimV, false, 3,
      (kDimK == 64    ? (kHeadSlots < 16 ? 12 : 13)
       : kDimK == 128 ? (kLong ? 6 : 7)
                      : (kHeadSlots < 16 ? 3 : 4)),
      (kDimK == 64    ? (kHeadSlots < 16 ? 12 : 13)
       : kDimK == 128 ? (kLong ? 6 : 7)
                      : 3),
      kHeadSlots<16, kMostAlone, kHeadSlots>;

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

// Whether it ran: it does not where the GPU, the build or the tensors do not suit it.
template <typename Element, int kDimK, int kDimV>
bool try_selected_forward_sm90(const SelectedForwardParams& params, cudaStream_t stream) {
  using Narrow = SelectedForwardShapeFor<Element, kDimK, kDimV, 16, false>;
  using Long = SelectedForwardShapeFor<Element, kDimK, kDimV, 16, kDimK == 128>;  // elsewhere both fit
  using Wide = SelectedForwardShapeFor<Element, kDimK, kDimV, 8, true>;
  using Widest = SelectedForwardShapeFor<Element, kDimK, kDimV, 4, true>;
  static_assert(union_shared_bytes<Narrow>(12, 16) <= kMostUnionSharedBytes &&
                union_shared_bytes<Long>(12, kMostUnionSelected) <= kMostUnionSharedBytes &&
                union_shared_bytes<Wide>(24, kMostUnionSelected) <= kMostUnionSharedBytes &&
                union_shared_bytes<Widest>(48, 16) <= kMostUnionSharedBytes);
  if (!selected_forward_fits_sm90(params) || tensor_map_encoder() == nullptr ||
      !runs_on_this_device(selected_forward_sm90<Wide>, "selected attention")) {
    return false;
  }
  if (narrow_union(params.sequences, params.num_selected)) {
    launch_selected_forward_shape<Narrow>(params, stream);
  } else if (params.sequences.group > 8) {
    launch_selected_forward_shape<Long>(params, stream);
  } else if (params.sequences.group <= 4 && params.num_selected <= 16 &&
             params.sequences.length_k <= int64_t{Widest::kMostBlocks} * Widest::kKeys) {
    launch_selected_forward_shape<Widest>(params, stream);
  } else {
    launch_selected_forward_shape<Wide>(params, stream);
  }
  return true;
}

}  // namespace nsa
