// Launches of the gradient of q for Hopper, and which calls it takes.
#pragma once

#include "selected/backward_query_sm90.cuh"
#include "selected/launch_union_sm90.cuh"

namespace nsa {

// Whether these tensors suit the kernel; others run on the sm_80 kernel.
inline bool selected_backward_query_fits_sm90(const SelectedBackwardParams& params) {
  const Sequences& s = params.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  return union_fits_sm90(s, params.select_size, params.num_selected, params.q, params.k, params.v) &&
         copies_by_map(params.grad_out, batch, s.length_q, int64_t{s.heads_kv} * s.group);
}

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
  const Sequences& s = selected.sequences;
  const int32_t tokens = group_tokens_of<Shape>(params.walk);
  params.walk.grad_out = tensor_map(selected.grad_out, kElementType<typename Shape::Element>, s.packed() ? 1 : s.batch,
                                    s.length_q, int64_t{s.heads_kv} * s.group, params.walk.head_slots, tokens, kName);
  launch_union<Shape>(selected_backward_query_sm90<Shape>, params, selected.num_selected, tokens, stream, kName);
}

// Whether it ran: it does not where the GPU, the build or the tensors do not suit it.
template <typename Element, int kDimK, int kDimV>
bool try_selected_backward_query_sm90(const SelectedBackwardParams& params, cudaStream_t stream) {
  using Narrow = SelectedBackwardQueryShapeFor<Element, kDimK, kDimV, false>;
  using Wide = SelectedBackwardQueryShapeFor<Element, kDimK, kDimV, true>;
  static_assert(union_shared_bytes<Narrow>(8, 16) <= kMostUnionSharedBytes &&
                union_shared_bytes<Wide>(16, kMostUnionSelected) <= kMostUnionSharedBytes);
  if (!selected_backward_query_fits_sm90(params) || tensor_map_encoder() == nullptr ||
      !runs_on_this_device(selected_backward_query_sm90<Wide>, "gradient of q of selected attention")) {
    return false;
  }
  if (narrow_union(params.sequences, params.num_selected)) {
    launch_selected_backward_query_shape<Narrow>(params, stream);
  } else {
    launch_selected_backward_query_shape<Wide>(params, stream);
  }
  return true;
}

}  // namespace nsa
