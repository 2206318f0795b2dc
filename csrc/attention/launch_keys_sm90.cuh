// Launches of Hopper's gradients of k and v over a range, which calls they take, and how rows are split.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention/backward_keys_sm90.cuh"
#include "attention/launch.h"
#include "common/dispatch.h"
#include "common/launch_sm90.cuh"

namespace nsa {

template <typename Element, int kDimK, int kDimV>
using RangeKeysSm90Shape =
    KeyGradientsSm90Shape<Element, kDimK, kDimV, (kDimK <= 128 ? 64 : 32), (kDimK <= 64 ? 6 : 4)>;

// Keys of a block of threads.
constexpr int64_t kKeysPerRangeTileSm90 = 128;

// Rows of a step.
constexpr int32_t range_keys_step_rows(int32_t dim_k) { return dim_k <= 128 ? 64 : 32; }

// Whether these tensors suit the kernel; others run on the sm_80 kernel. A group that leaves a quarter of the rows
// empty is not worth it.
inline bool range_backward_keys_fits_sm90(const RangeBackwardParams& params) {
  const Sequences& s = params.sequences;
  const int64_t batch = s.packed() ? 1 : s.batch;
  const int64_t heads = int64_t{s.heads_kv} * s.group;
  const int32_t rows = range_keys_step_rows(params.q.width);
  return rows / s.group * s.group >= rows / 4 * 3 && params.scale != 0.f && params.q.width <= 192 &&
         params.v.width <= 128 && params.num_keys > 0 && copies_by_map(params.q, batch, s.length_q, heads) &&
         copies_by_map(params.grad_out, batch, s.length_q, heads) &&
         copies_by_map(params.k, batch, params.num_keys, s.heads_kv) &&
         copies_by_map(params.v, batch, params.num_keys, s.heads_kv);
}

// Into which splits to cut the queries that see a tile of keys. Of a few numbers of splits, the one whose last block is
// expected to end first: blocks of more than half the length run in rounds, shorter ones fill gaps, and every partial
// sum is written and read.
inline RangeSplits choose_range_keys_splits_sm90(const RangeBackwardParams& params, int multiprocessors) {
  constexpr int64_t kMostSplits = 24;
  constexpr int64_t kSampledTiles = 32;
  constexpr double kItemSteps = 4;       // that starting and ending a block takes
  constexpr double kPartialSteps = 0.1;  // that a partial sum takes, of all multiprocessors' time
  constexpr int64_t kMostPartialFloats = int64_t{64} << 20;
  const Sequences& s = params.sequences;
  const Visibility& seen = params.visibility;
  const int32_t step_queries = range_keys_step_rows(params.q.width) / s.group;
  const int64_t slots = count_slots(s, params.num_keys, kKeysPerRangeTileSm90);
  const int64_t tiles = slots * s.heads_kv;
  const bool window = seen.window != Visibility::kNoWindow;
  const int64_t queries = window ? min_of(s.length_q, int64_t{seen.window} + kKeysPerRangeTileSm90 - 1) : s.length_q;
  const int64_t tile_floats = kKeysPerRangeTileSm90 * tile_row_size(params.q.width, params.v.width);
  // The first query of a tile, as if all sequences were one.
  const int64_t offset = s.packed() ? 0 : s.length_k - s.length_q;
  const int64_t of_sequence = s.packed() ? slots : slots / max_of(s.batch, 1);
  const int64_t sample = ceil_div(max_of(of_sequence, 1), kSampledTiles);
  const auto first_query = [&](int64_t tile) {
    const int64_t first = tile * kKeysPerRangeTileSm90 * seen.stride + seen.first_seen - offset;
    return window ? 0 : min_of(max_of(first, 0), queries);
  };
  RangeSplits best{1, 0, 0};
  double best_steps = 0;
  for (int64_t splits = 1; splits <= kMostSplits; ++splits) {
    const int64_t split_queries = max_of(ceil_div(ceil_div(queries, splits), step_queries) * step_queries, 1);
    const int64_t floats = splits > 1 ? tiles * splits * tile_floats : 0;
    if (splits > 1 && (floats > kMostPartialFloats || (splits - 1) * split_queries >= queries)) {
      continue;
    }
    int64_t whole = 0;
    int64_t rest = 0;  // queries of shorter items
    int64_t items = 0;
    for (int64_t tile = sample / 2; tile < of_sequence; tile += sample) {
      const int64_t first = first_query(tile);
      const int64_t first_split = first / split_queries;
      const int64_t count = max_of(ceil_div(queries, split_queries) - first_split, 1);
      items += count;
      const int64_t of_first = (first_split + 1) * split_queries - first;
      whole += 2 * of_first > split_queries ? count : count - 1;
      rest += 2 * of_first > split_queries ? 0 : of_first;
    }
    const double scale = static_cast<double>(sample * s.heads_kv) * (s.packed() ? 1. : s.batch);
    const double rounds = std::ceil(static_cast<double>(whole) * scale / multiprocessors);
    const double steps = rounds * (static_cast<double>(split_queries) / step_queries + kItemSteps) +
                         static_cast<double>(rest) * scale / step_queries / multiprocessors +
                         (splits > 1 ? static_cast<double>(items) * scale * kPartialSteps : 0.);
    if (best.rows_per_split == 0 || steps < best_steps) {
      best = {static_cast<int32_t>(splits), static_cast<int32_t>(split_queries * s.group), floats};
      best_steps = steps;
    }
  }
  return best;
}

// In which order first splits go: as they come where all are of one length, or tiles are too many or not known here.
inline RangeKeyOrder order_range_key_tiles(const RangeBackwardParams& params) {
  const Sequences& s = params.sequences;
  const int64_t tiles = ceil_div(params.num_keys, kKeysPerRangeTileSm90);
  RangeKeyOrder order{};
  if (s.packed() || params.visibility.window != Visibility::kNoWindow || tiles > RangeKeyOrder::kMostTiles) {
    return order;
  }
  order.tiles = static_cast<int32_t>(tiles);
  const int64_t split_queries = params.rows_per_split / s.group;
  const int64_t offset = s.length_k - s.length_q;
  int64_t lengths[RangeKeyOrder::kMostTiles];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int32_t key = static_cast<int32_t>(tile * kKeysPerRangeTileSm90);
    const int64_t first = max_of(params.visibility.first_position(key) - offset, 0);
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
  const Sequences& s = range.sequences;
  const int64_t slots = count_slots(s, range.num_keys, kKeysPerRangeTileSm90);
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

// Whether the kernel takes a call: the tensors, the GPU and the build suit it.
template <typename Element, int kDimK, int kDimV>
bool range_backward_keys_runs_sm90(const RangeBackwardParams& params) {
  return range_backward_keys_fits_sm90(params) && tensor_map_encoder() != nullptr &&
         runs_on_this_device(range_backward_keys_sm90<RangeKeysSm90Shape<Element, kDimK, kDimV>>,
                             "gradients of k and v over a range");
}

template <typename Element, int kDimK, int kDimV>
void launch_range_backward_keys_sm90(const RangeBackwardParams& params, cudaStream_t stream) {
  launch_range_backward_keys_shape<RangeKeysSm90Shape<Element, kDimK, kDimV>>(params, stream);
}

}  // namespace nsa
