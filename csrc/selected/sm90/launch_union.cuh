// What launches of the kernels for Hopper that walk unions of lists share.
#pragma once

#include "common/sm90/launch.cuh"
#include "selected/sm90/union.cuh"

namespace nsa {

// All but the map of the gradient.
template <typename Shape>
UnionParams union_params(const SequenceLayout& s, const int32_t* block_indices, int32_t num_selected,
                         const TensorView& q, const TensorView& k, const TensorView& v, const char* name) {
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const int64_t batch = s.packed() ? 1 : s.batch;
  const int32_t head_slots = Shape::kHeadSlots != 0 ? Shape::kHeadSlots : s.group > 8 ? 16 : 8;
  const int32_t tokens = 64 / head_slots;
  UnionParams u{.sequences = s,
                .block_indices = block_indices,
                .num_selected = num_selected,
                .head_slots = head_slots,
                .tiles = static_cast<int32_t>(count_slots(s, s.length_q, Shape::kGroups * tokens) * s.heads_kv *
                                              ceil_div(s.group, head_slots)),
                .first_tile = 0,
                .end_tile = 0,
                .k = tensor_map(k, kType, batch, s.length_k, s.heads_kv, 1, Shape::kKeys, name),
                .v = tensor_map(v, kType, batch, s.length_k, s.heads_kv, 1, Shape::kKeys, name),
                .q = tensor_map(q, kType, batch, s.length_q, int64_t{s.heads_kv} * s.group, head_slots, tokens, name),
                .grad_out = {}};
  u.end_tile = u.tiles;
  return u;
}

template <typename Shape, typename Params>
void launch_union(void (*kernel)(Params), const Params& params, int32_t num_selected, int32_t group_tokens,
                  cudaStream_t stream, const char* name) {
  launch(kernel, min_of(params.walk.end_tile - params.walk.first_tile, multiprocessors(name)), Shape::kThreads,
         union_shared_bytes<Shape>(Shape::kGroups * group_tokens, num_selected), stream, name, params);
}

}  // namespace nsa
