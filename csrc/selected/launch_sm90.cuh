// Launches of the kernel for Hopper, which calls it takes, and how many stages it runs with.
#pragma once

#include "common/launch_sm90.cuh"
#include "selected/forward_sm90.cuh"

namespace nsa {

// Whether these tensors suit the kernel; others run on the sm_80 kernel.
inline bool selected_forward_fits_sm90(const SelectedForwardParams& params) {
  const Sequences& s = params.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  return params.select_size == 64 && params.num_selected <= 64 && params.q.width <= 192 && params.v.width <= 128 &&
         params.scale != 0.f && s.length_k > 0 && s.length_k <= int64_t{kMostUnionBlocks} * params.select_size &&
         copies_by_map(params.k, batch, s.length_k, s.heads_kv) &&
         copies_by_map(params.v, batch, s.length_k, s.heads_kv);
}

// Stages beside Q and lists of up to 16, or up to 64, blocks.
template <int kDimK>
constexpr int selected_stages(bool short_lists) {
  return kDimK == 64 ? (short_lists ? 12 : 11) : kDimK == 128 ? (short_lists ? 5 : 4) : 3;
}

template <typename Shape>
void launch_selected_forward_shape(const SelectedForwardParams& selected, cudaStream_t stream) {
  constexpr const char* kName = "selected attention";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const Sequences& s = selected.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  SelectedForwardSm90Params params{
      .selected = selected,
      .tiles = count_slots(s, s.length_q, Shape::kTokens) * s.heads_kv * ceil_div(s.group, Shape::kHeads),
      .k = tensor_map(selected.k, kType, batch, s.length_k, s.heads_kv, 1, Shape::kKeys, kName),
      .v = tensor_map(selected.v, kType, batch, s.length_k, s.heads_kv, 1, Shape::kKeys, kName)};
  int device = 0;
  int multiprocessors = 0;
  check_cuda(cudaGetDevice(&device), kName);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kName);
  launch(selected_forward_sm90<Shape>, min_of(params.tiles, multiprocessors), Shape::kThreads,
         selected_forward_sm90_shared_bytes<Shape>(selected.num_selected), stream, kName, params);
}

// Whether it ran: it does not where the GPU, the build or the tensors do not suit it.
template <typename Element, int kDimK, int kDimV>
bool try_selected_forward_sm90(const SelectedForwardParams& params, cudaStream_t stream) {
  using Short = SelectedForwardSm90Shape<Element, kDimK, kDimV, selected_stages<kDimK>(true)>;
  using Long = SelectedForwardSm90Shape<Element, kDimK, kDimV, selected_stages<kDimK>(false)>;
  if (!selected_forward_fits_sm90(params) || tensor_map_encoder() == nullptr ||
      !runs_on_this_device(selected_forward_sm90<Long>, "selected attention")) {
    return false;
  }
  if (params.num_selected <= 16) {
    launch_selected_forward_shape<Short>(params, stream);
  } else {
    launch_selected_forward_shape<Long>(params, stream);
  }
  return true;
}

}  // namespace nsa
