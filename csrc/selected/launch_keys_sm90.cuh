// Launches of Hopper's gradients of k and v over listed blocks, and which calls they take.
#pragma once

#include "common/dispatch.h"
#include "common/launch_sm90.cuh"
#include "selected/backward_keys_sm90.cuh"

namespace nsa {

// Rows of a step: as many as two rings of at least three stages leave room for beside K and V.
constexpr int32_t selected_keys_step_rows(int32_t dim_k) { return dim_k <= 64 ? 64 : dim_k <= 128 ? 48 : 32; }

template <typename Element, int kDimK, int kDimV>
using SelectedKeysSm90Shape =
    KeyGradientsSm90Shape<Element, kDimK, kDimV, selected_keys_step_rows(kDimK), (kDimK <= 64 ? 5 : 3)>;

// Whether these tensors suit the kernel; others run on the sm_80 kernel.
inline bool selected_backward_keys_fits_sm90(const SelectedBackwardParams& params) {
  const Sequences& s = params.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  const int64_t heads = int64_t{s.heads_kv} * s.group;
  // Of the tiles: values wider than 64 take keys of 64 columns to tiles of 128, too.
  int32_t rows = 0;
  with_tile_dims(params.q.width, params.v.width, [&](auto k, auto) { rows = selected_keys_step_rows(k); });
  return params.select_size == 64 && s.group >= 4 && rows / s.group * s.group >= rows / 4 * 3 && params.scale != 0.f &&
         params.q.width <= 192 && params.v.width <= 128 && s.length_k > 0 &&
         copies_by_map(params.q, batch, s.length_q, heads) &&
         copies_by_map(params.grad_out, batch, s.length_q, heads) &&
         copies_by_map(params.k, batch, s.length_k, s.heads_kv) &&
         copies_by_map(params.v, batch, s.length_k, s.heads_kv);
}

// Floats of the sums of one KV head's blocks.
inline int64_t selected_head_sums(const SelectedBackwardParams& params) {
  return params.chosen_by.blocks / params.sequences.heads_kv * 64 * tile_row_size(params.q.width, params.v.width);
}
// KV heads of a launch, whose sums take up to half a GB; 0 where the GPU, the build or the tensors do not suit the
// kernel. Of the parameters it needs all but chosen_by (there only the number of blocks), partials and handed.
template <typename Element, int kDimK, int kDimV>
int32_t selected_keys_heads_sm90(const SelectedBackwardParams& params) {
  constexpr int64_t kMostFloats = int64_t{1} << 27;
  if (!selected_backward_keys_fits_sm90(params) || tensor_map_encoder() == nullptr ||
      !runs_on_this_device(selected_backward_keys_sm90<SelectedKeysSm90Shape<Element, kDimK, kDimV>>,
                           "gradients of k and v of selected attention")) {
    return 0;
  }
  return static_cast<int32_t>(min_of(max_of(kMostFloats / selected_head_sums(params), 1), params.sequences.heads_kv));
}

// Of the KV heads [first_head, first_head + heads).
template <typename Shape>
void launch_selected_backward_keys_heads(const SelectedBackwardParams& selected, int32_t first_head, int32_t heads_kv,
                                         cudaStream_t stream) {
  constexpr const char* kName = "gradients of k and v of selected attention";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const Sequences& s = selected.sequences;
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

template <typename Element, int kDimK, int kDimV>
void launch_selected_backward_keys_sm90(const SelectedBackwardParams& params, cudaStream_t stream) {
  launch_selected_backward_keys_shape<SelectedKeysSm90Shape<Element, kDimK, kDimV>>(params, params.keys_heads, stream);
}

}  // namespace nsa
