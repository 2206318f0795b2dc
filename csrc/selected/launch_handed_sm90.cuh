// Launches of Hopper's backward over listed blocks in which the kernel of the gradients of k and v hands the gradients
// of scores to that of the gradient of q, and which calls they take.
#pragma once

#include "selected/backward_query_handed_sm90.cuh"
#include "selected/launch.h"
#include "selected/launch_keys_sm90.cuh"
#include "selected/launch_union_sm90.cuh"

namespace nsa {

constexpr int64_t kHandedEnd = 4096;  // bytes after the last that rows of no head may read

inline int64_t handed_head_bytes(const Sequences& s, int32_t num_selected) {
  const int64_t queries = s.packed() ? s.length_q : s.batch * s.length_q;
  return queries * num_selected * HandedScores::units(s.group) * 32;
}
// KV heads at a time; 0 where one takes too much: more than 2 GB, and than q twice.
inline int32_t handed_heads(const Sequences& s, int32_t num_selected, int32_t q_width) {
  const int64_t queries = s.packed() ? s.length_q : s.batch * s.length_q;
  const int64_t twice_q = queries * s.heads_kv * s.group * q_width * 4;
  const int64_t head = max_of(handed_head_bytes(s, num_selected), 1);
  const int64_t least = head <= int64_t{1} << 31 ? 1 : 0;
  return static_cast<int32_t>(min_of(max_of(max_of(twice_q, int64_t{1} << 30) / head, least), s.heads_kv));
}

// Whether these tensors suit the kernels.
inline bool selected_backward_handed_fits_sm90(const SelectedBackwardParams& params) {
  const Sequences& s = params.sequences;
  return selected_backward_keys_fits_sm90(params) &&
         union_fits_sm90(s, params.select_size, params.num_selected, params.q, params.k, params.v) &&
         handed_heads(s, params.num_selected, params.q.width) > 0;
}

template <typename Element, int kDimK, bool kWide>
using SelectedHandedShape = HandedShape<Element, kDimK, (kDimK <= 128 && !(kWide && kDimK == 128) ? 4 : 3),
                                        (kDimK == 64    ? 20
                                         : kDimK == 128 ? (kWide ? 11 : 13)
                                                        : (kWide ? 7 : 8)),
                                        kWide, 2>;

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
void launch_selected_backward_handed_shapes(const SelectedBackwardParams& all, cudaStream_t stream) {
  const Sequences& s = all.sequences;
  static_assert(union_shared_bytes<NarrowShape>(4 * NarrowShape::kGroups, 16) <= kMostUnionSharedBytes &&
                union_shared_bytes<WideShape>(8 * WideShape::kGroups, kMostUnionSelected) <= kMostUnionSharedBytes);
  SelectedBackwardParams selected = all;
  selected.handed.queries = s.packed() ? s.length_q : s.batch * s.length_q;
  for (int32_t head = 0; head < s.heads_kv; head += all.handed.heads) {
    selected.handed.first_head = head;
    selected.handed.heads = static_cast<int32_t>(min_of(all.handed.heads, s.heads_kv - head));
    launch_selected_backward_keys_heads<KeysShape>(selected, head, selected.handed.heads, stream);
    if (narrow_union(s, all.num_selected)) {
      launch_selected_query_handed_shape<NarrowShape>(selected, stream);
    } else {
      launch_selected_query_handed_shape<WideShape>(selected, stream);
    }
  }
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_handed_sm90(const SelectedBackwardParams& params, cudaStream_t stream) {
  launch_selected_backward_handed_shapes<SelectedKeysSm90Shape<Element, kDimK, kDimV>,
                                         SelectedHandedShape<Element, kDimK, false>,
                                         SelectedHandedShape<Element, kDimK, true>>(params, stream);
}

template <typename Element, int kDimK, int kDimV>
SelectedBackwardPlan selected_backward_plan_sm90(const SelectedBackwardParams& params) {
  const int32_t keys_heads = selected_keys_heads_sm90<Element, kDimK, kDimV>(params);
  if (keys_heads == 0 || !selected_backward_handed_fits_sm90(params) ||
      !runs_on_this_device(selected_query_handed_sm90<SelectedHandedShape<Element, kDimK, true>>,
                           "gradient of q of selected attention")) {
    return {keys_heads, 0, 0};
  }
  const auto heads =
      static_cast<int32_t>(min_of(handed_heads(params.sequences, params.num_selected, params.q.width), keys_heads));
  return {heads, heads, heads * handed_head_bytes(params.sequences, params.num_selected) + kHandedEnd};
}

}  // namespace nsa
