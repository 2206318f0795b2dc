// Launches of Hopper's gradients of k and v over a range, and in which order.
#pragma once

#include <algorithm>

#include "common/dispatch.h"
#include "common/sm90/launch.cuh"
#include "range/cuda/kernels.h"
#include "range/plan.h"
#include "range/sm90/backward_keys.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
using RangeKeysSm90Shape =
    KeyGradientsSm90Shape<Element, kDimK, kDimV, range_sm90::key_step_rows(kDimK), range_sm90::key_stages(kDimK)>;

// In which order first splits go: as they come where all are of one length, or tiles are too many or not known here.
inline RangeKeyOrder order_range_key_tiles(const RangeBackwardParams& params) {
  const SequenceLayout& s = params.sequences;
  const int64_t tiles = ceil_div(params.num_keys, range_sm90::kKeysPerGradientTile);
  RangeKeyOrder order{};
  if (s.packed() || params.visibility.window != Visibility::kNoWindow || tiles > RangeKeyOrder::kMostTiles) {
    return order;
  }
  order.tiles = static_cast<int32_t>(tiles);
  const int64_t split_queries = params.rows_per_split / s.group;
  int64_t lengths[RangeKeyOrder::kMostTiles];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int32_t key = static_cast<int32_t>(tile * range_sm90::kKeysPerGradientTile);
    const int64_t first = max_of(params.visibility.first_position(key) - s.offset, 0);
    lengths[tile] = min_of((first / split_queries + 1) * split_queries, s.length_q) - first;
    order.tile[tile] = static_cast<uint16_t>(tile);
  }
  std::stable_sort(order.tile, order.tile + tiles, [&](int a, int b) { return lengths[a] > lengths[b]; });
  return order;
}

template <typename Shape>
void launch_range_backward_keys_shape(const RangeBackwardParams& range, cudaStream_t stream) {
  constexpr const char* kName = "gradients of k and v over a range";
  constexpr ElementType kType = kElementType<typename Shape::Element>;
  const SequenceLayout& s = range.sequences;
  const int64_t slots = count_slots(s, range.num_keys, range_sm90::kKeysPerGradientTile);
  const int64_t batch = s.packed() ? 1 : s.batch;
  const int64_t heads = int64_t{s.heads_kv} * s.group;
  const auto group = static_cast<uint32_t>(s.group);
  const uint32_t step_queries = Shape::kRows / group;
  RangeBackwardKeysSm90Params params{
      .range = range,
      .slots = static_cast<int32_t>(min_of(slots, 0x7fffffff)),
      .order = order_range_key_tiles(range),
      .step_queries = static_cast<int32_t>(step_queries),
      .q = tensor_map(range.q, kType, batch, s.length_q, heads, group, step_queries, kName),
      .grad_out = tensor_map(range.grad_out, kType, batch, s.length_q, heads, group, step_queries, kName),
      .q_token = tensor_map(range.q, kType, batch, s.length_q, heads, group, 1, kName),
      .grad_out_token = tensor_map(range.grad_out, kType, batch, s.length_q, heads, group, 1, kName),
      .k = tensor_map(range.k, kType, batch, range.num_keys, s.heads_kv, 1, Shape::kKeys, kName),
      .v = tensor_map(range.v, kType, batch, range.num_keys, s.heads_kv, 1, Shape::kKeys, kName)};
  launch(range_backward_keys_sm90<Shape>, slots * s.heads_kv * range.splits, 3 * kWarpgroup,
         sizeof(RangeBackwardKeysShared<Shape>), stream, kName, params);
  if (range.splits > 1) {
    constexpr int64_t kParts = 64 * (Shape::kDimK + Shape::kDimV) / 1024;
    launch(range_add_partials_sm90<Shape>, slots * s.heads_kv * 2 * kParts, 256, 0, stream,
           "sums of gradients over a range", params);
  }
}

template <typename Element, int kDimK, int kDimV>
void launch_range_backward_keys_sm90(const RangeBackwardParams& params, cudaStream_t stream) {
  using Shape = RangeKeysSm90Shape<Element, kDimK, kDimV>;
  static_assert(states_sm90(range_sm90::backward_keys_tile({kDimK, kDimV}), sizeof(RangeBackwardKeysShared<Shape>)));
  static_assert(2 * Shape::kKeys == range_sm90::kKeysPerGradientTile);
  launch_range_backward_keys_shape<Shape>(params, stream);
}

}  // namespace nsa
