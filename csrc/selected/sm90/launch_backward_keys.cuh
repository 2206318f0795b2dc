// Launches of Hopper's gradients of k and v over listed blocks.
#pragma once

#include "common/dispatch.h"
#include "common/sm90/launch.cuh"
#include "selected/cuda/kernels.h"
#include "selected/sm90/backward_keys.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
using SelectedKeysSm90Shape =
    KeyGradientsSm90Shape<Element, kDimK, kDimV, selected_sm90::key_step_rows(kDimK), selected_sm90::key_stages(kDimK)>;

// Of the KV heads [first_head, first_head + heads).
template <typename Shape>
void launch_selected_backward_keys_heads(const SelectedBackwardParams& selected, int32_t first_head, int32_t heads_kv,
                                         cudaStream_t stream) {
  constexpr const char* kName = "gradients of k and v of selected attention";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  static_assert(states_sm90(selected_sm90::backward_keys_tile({Shape::kDimK, Shape::kDimV}),
                            sizeof(SelectedBackwardKeysShared<Shape>)));
  const SequenceLayout& s = selected.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  const int64_t heads = int64_t{s.heads_kv} * s.group;
  const auto group = static_cast<uint32_t>(s.group);
  const KeyPieces& pieces = selected.chosen_by.pieces;
  const int64_t of_head = selected.chosen_by.blocks / s.heads_kv + 1;
  int32_t* const progress = pieces.progress + first_head * of_head;
  check_cuda(cudaMemsetAsync(progress, 0, heads_kv * of_head * sizeof(int32_t), stream), kName);
  SelectedBackwardKeysSm90Params params{
      .selected = selected,
      .first_head = first_head,
      .end_head = first_head + heads_kv,
      .first_block = static_cast<int32_t>(first_head * (of_head - 1)),
      .taken = progress,
      .step_queries = Shape::kRows / s.group,
      .q = tensor_map(selected.q, kType, batch, s.length_q, heads, group, 1, kName),
      .grad_out = tensor_map(selected.grad_out, kType, batch, s.length_q, heads, group, 1, kName),
      .k = tensor_map(selected.k, kType, batch, s.length_k, s.heads_kv, 1, Shape::kKeys, kName),
      .v = tensor_map(selected.v, kType, batch, s.length_k, s.heads_kv, 1, Shape::kKeys, kName)};
  launch(selected_backward_keys_sm90<Shape>, min_of(ceil_div(pieces.most_pieces * heads_kv, 2), multiprocessors(kName)),
         3 * kWarpgroup, sizeof(SelectedBackwardKeysShared<Shape>), stream, kName, params);
}

// Of all KV heads, `at_a_time` in a launch.
template <typename Shape>
void launch_selected_backward_keys_shape(const SelectedBackwardParams& selected, int32_t at_a_time,
                                         cudaStream_t stream) {
  const int32_t heads_kv = selected.sequences.heads_kv;
  for (int32_t head = 0; head < heads_kv; head += at_a_time) {
    launch_selected_backward_keys_heads<Shape>(selected, head, static_cast<int32_t>(min_of(at_a_time, heads_kv - head)),
                                               stream);
  }
}

}  // namespace nsa
