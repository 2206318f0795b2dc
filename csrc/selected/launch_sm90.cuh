// Launch of the Hopper kernel for one element type and one pair of head dimensions.
#pragma once

#include "common/launch.cuh"
#include "common/tensor_map.h"
#include "selected/forward_sm90.cuh"

namespace nsa {

// What it takes; everything else is for the sm_80 kernel.
inline bool selected_forward_sm90_takes(const SelectedForwardParams& p) {
  return p.select_size == 64 && p.num_selected <= 64 && p.q.width <= 192 && p.v.width <= 128 &&
         p.v.width <= (p.q.width + 63) / 64 * 64 && p.sequences.length_k <= int64_t{kMostUnionBlocks} * 64;
}

// Stages beside Q and lists of up to 16, or up to 64, blocks.
template <int kDimK, int kDimV>
constexpr int union_stages(bool short_lists) {
  return kDimK == 64 ? (short_lists ? 12 : 11) : kDimK == 128 ? (short_lists ? 5 : 4) : 3;
}

template <typename Element, int kDimK, int kDimV, int kStages>
void launch_union_forward(const SelectedForwardParams& p, cudaStream_t stream) {
  using Shape = UnionShape<Element, kDimK, kDimV, kStages>;
  const Sequences& s = p.sequences;
  const ElementType type = __is_same(Element, Half) ? ElementType::kFloat16 : ElementType::kBFloat16;
  const int64_t sequences = s.packed() ? 1 : s.batch;
  const char* const name = "selected attention";
  UnionForwardParams params{
      p, count_slots(s, s.length_q, Shape::kTokens) * s.heads_kv * ceil_div(s.group, 16),
      tensor_map(p.k, type, sequences, s.length_k, s.heads_kv, 1, Shape::kKeys, name),
      tensor_map(p.v, type, sequences, s.length_k, s.heads_kv, 1, Shape::kKeys, name)};
  int device = 0;
  int processors = 0;
  check_cuda(cudaGetDevice(&device), name);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name);
  launch(union_forward<Shape>, min_of(params.tiles, processors), Shape::kThreads,
         union_forward_shared_bytes<Shape>(p.num_selected), stream, name, params);
}

template <typename Element, int kDimK, int kDimV>
void launch_selected_forward_sm90(const SelectedForwardParams& p, cudaStream_t stream) {
  if (p.num_selected <= 16) {
    launch_union_forward<Element, kDimK, kDimV, union_stages<kDimK, kDimV>(true)>(p, stream);
  } else {
    launch_union_forward<Element, kDimK, kDimV, union_stages<kDimK, kDimV>(false)>(p, stream);
  }
}

}  // namespace nsa
