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

// Of the KV heads [first_head, first_head + heads), whose partial sums are left as they are.
template <typename Shape>
void launch_selected_backward_keys_heads(const SelectedBackwardParams& selected, int32_t first_head, int32_t heads_kv,
                                         cudaStream_t stream) {
  constexpr const char* kName = "gradients of k and v of selected attention";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const Sequences& s = selected.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  const int64_t heads = int64_t{s.heads_kv} * s.group;
  const auto group = static_cast<uint32_t>(s.group);
  const ChosenBy& chosen_by = selected.chosen_by;
  const int64_t slots = chosen_by.blocks / s.heads_kv;
  // All heads have as many pairs.
  const int64_t most_segments = (chosen_by.full_segments + 1) * heads_kv / s.heads_kv + 1 + slots * heads_kv;
  SelectedBackwardKeysSm90Params params{
      .selected = selected,
      .first_block = first_head * slots,
      .end_block = (first_head + heads_kv) * slots,
      .step_queries = Shape::kRows / s.group,
      .q = tensor_map(selected.q, kType, batch, s.length_q, heads, group, 1, kName),
      .grad_out = tensor_map(selected.grad_out, kType, batch, s.length_q, heads, group, 1, kName),
      .k = tensor_map(selected.k, kType, batch, s.length_k, s.heads_kv, 1, Shape::kKeys, kName),
      .v = tensor_map(selected.v, kType, batch, s.length_k, s.heads_kv, 1, Shape::kKeys, kName)};
  launch(selected_backward_keys_sm90<Shape>, ceil_div(most_segments, 2), 3 * kWarpgroup,
         sizeof(SelectedBackwardKeysShared<Shape>), stream, kName, params);
}

template <typename Shape>
void launch_selected_add_partials(const SelectedBackwardParams& selected, cudaStream_t stream) {
  if (selected.chosen_by.full_segments > 0) {
    launch(selected_add_partials<Shape>, selected.chosen_by.blocks, 256, 0, stream,
           "sums of gradients of selected attention", selected);
  }
}

template <typename Shape>
void launch_selected_backward_keys_shape(const SelectedBackwardParams& selected, cudaStream_t stream) {
  launch_selected_backward_keys_heads<Shape>(selected, 0, selected.sequences.heads_kv, stream);
  launch_selected_add_partials<Shape>(selected, stream);
}

// Whether it ran: it does not where the GPU, the build or the tensors do not suit it.
template <typename Element, int kDimK, int kDimV>
bool try_selected_backward_keys_sm90(const SelectedBackwardParams& params, cudaStream_t stream) {
  using Shape = SelectedKeysSm90Shape<Element, kDimK, kDimV>;
  if (!selected_backward_keys_fits_sm90(params) || tensor_map_encoder() == nullptr ||
      !runs_on_this_device(selected_backward_keys_sm90<Shape>, "gradients of k and v of selected attention")) {
    return false;
  }
  launch_selected_backward_keys_shape<Shape>(params, stream);
  return true;
}

}  // namespace nsa
