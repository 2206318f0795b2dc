// Launch of the forward kernel for Hopper, and the tile sizes it runs with.
#pragma once

#include "common/sm90/launch.cuh"
#include "range/cuda/kernels.h"
#include "range/plan.h"
#include "range/sm90/forward.cuh"

namespace nsa {

template <typename Shape>
void launch_range_forward_shape(const RangeForwardParams& range, cudaStream_t stream) {
  constexpr const char* kName = "attention over a range";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const SequenceLayout& s = range.sequences;
  const int32_t rows = range_sm90::filled_rows(s.group);
  const int64_t tile_rows = int64_t{Shape::kConsumers} * rows;
  const int64_t slots = count_slots(s, s.length_q * s.group, tile_rows);
  const int64_t tiles = slots * s.heads_kv;
  if (tiles > 0x3fffffff) {
    throw std::runtime_error("nsa_torch: attention over a range: too many tiles for one launch");
  }
  const int64_t batch = s.packed() ? 1 : s.batch;
  const auto group = static_cast<uint32_t>(s.group);
  const int64_t dense_tiles = ceil_div(s.length_q * s.group, tile_rows);
  const auto of_rows = [&](const void* data) {
    TensorView view = range.out;
    view.data = const_cast<void*>(data);
    return data == nullptr ? CUtensorMap{}
                           : tensor_map(view, kType, batch, s.length_q, s.heads_kv * s.group, group, 64 / group, kName);
  };
  const RangeForwardSm90Params params{
      .range = range,
      .scale_log2 = range.scale * kLog2E,
      .tile_rows = static_cast<int32_t>(tile_rows),
      .tiles = static_cast<int32_t>(tiles),
      .slots = static_cast<int32_t>(slots),
      .dense_tiles = static_cast<int32_t>(dense_tiles),
      .by_tile_rows = Divisor(static_cast<uint32_t>(tile_rows)),
      .by_dense_tiles = Divisor(static_cast<uint32_t>(dense_tiles)),
      .by_heads_kv = Divisor(static_cast<uint32_t>(s.heads_kv)),
      .consumer_rows = rows,
      .consumer_bytes = rows * Shape::kDimK * static_cast<int32_t>(sizeof(typename Shape::Element)),
      .q = tensor_map(range.q, kType, batch, s.length_q, s.heads_kv * s.group, group, 64 / group, kName),
      .k = tensor_map(range.k, kType, batch, range.num_keys, s.heads_kv, 1, Shape::kKeys, kName),
      .v = tensor_map(range.v, kType, batch, range.num_keys, s.heads_kv, 1, Shape::kKeys, kName),
      .out = of_rows(range.out.data),
      .others = {of_rows(range.sum.others[0]), of_rows(range.sum.others[1])},
      .sum = of_rows(range.sum.out)};
  launch(range_forward_sm90<Shape>, min_of(tiles, multiprocessors(kName)), Shape::kThreads,
         sizeof(typename Shape::Shared), stream, kName, params);
}

template <typename Element, int kDimK, int kDimV>
using ForwardSm90Shape =
    RangeForwardSm90Shape<Element, kDimK, kDimV, range_sm90::kForwardGroups, range_sm90::forward_keys(kDimK),
                          range_sm90::kForwardStages, range_sm90::forward_q_stages(kDimK)>;

template <typename Element, int kDimK, int kDimV>
void launch_range_forward_sm90(const RangeForwardParams& params, cudaStream_t stream) {
  using Shape = ForwardSm90Shape<Element, kDimK, kDimV>;
  static_assert(Shape::kSums == range_sm90::takes_sum(kDimK) && Shape::kTiles == range_sm90::kForwardTiles);
  static_assert(states_sm90(range_sm90::forward_tile({kDimK, kDimV}), sizeof(typename Shape::Shared)));
  launch_range_forward_shape<Shape>(params, stream);
}

}  // namespace nsa
