#include "range/plan.h"

#include <cmath>

#include "common/dispatch.h"

namespace nsa {
namespace {

using range_sm90::filled_rows;
using range_sm90::key_step_rows;

const char* forward_not_for_sm90(const RangeForwardParams& params) {
  const SequenceLayout& s = params.sequences;
  // Half of the rows, at least, are filled by any group of up to 64 heads.
  if (s.group > range_sm90::kGroupRows) {
    return "a group of more than 64 heads has no kernel for compute capability 9.0";
  }
  if (!(params.scale > 0.f)) {
    return "a scale that is not above 0 has no kernel for compute capability 9.0";
  }
  if (!has_sm90_kernels(tile_dims(params.q.width, params.v.width).k)) {
    return kDimsTooLarge;
  }
  if (params.num_keys <= 0) {
    return kNoKeys;
  }
  if (!copies_rows(s, params.q) || !copies_keys(s, params.k, params.num_keys) ||
      !copies_keys(s, params.v, params.num_keys) || !copies_rows(s, params.out)) {
    return kNotCopied;
  }
  return nullptr;
}

// What both kernels of the backward ask of a call.
const char* backward_not_for_sm90(const RangeBackwardParams& params) {
  const SequenceLayout& s = params.sequences;
  if (!has_sm90_kernels(tile_dims(params.q.width, params.v.width).k)) {
    return kDimsTooLarge;
  }
  if (params.num_keys <= 0) {
    return kNoKeys;
  }
  if (!copies_rows(s, params.q) || !copies_rows(s, params.grad_out) || !copies_keys(s, params.k, params.num_keys) ||
      !copies_keys(s, params.v, params.num_keys)) {
    return kNotCopied;
  }
  return nullptr;
}

// A group that leaves a quarter of the rows empty is not worth it.
constexpr const char* kRowsEmpty = "the heads of a group would leave a quarter of the rows of a step empty";

const char* query_not_for_sm90(const RangeBackwardParams& params) {
  const int32_t group = params.sequences.group;
  if (group > range_sm90::kGroupRows || filled_rows(group) < range_sm90::kGroupRows / 4 * 3) {
    return kRowsEmpty;
  }
  return backward_not_for_sm90(params);
}

const char* keys_not_for_sm90(const RangeBackwardParams& params) {
  const int32_t group = params.sequences.group;
  const int32_t rows = key_step_rows(params.q.width);
  if (rows / group * group < rows / 4 * 3) {
    return kRowsEmpty;
  }
  if (params.scale == 0.f) {
    return "a scale of 0 has no kernel for compute capability 9.0";
  }
  return backward_not_for_sm90(params);
}

RangeSplits split_rows_sm80(const RangeBackwardParams& params, int multiprocessors) {
  constexpr int64_t kWaves = 8;
  constexpr int64_t kBlocksPerMultiprocessor = 2;
  constexpr int64_t kLeastRows = 1024;  // fewer are not worth a partial sum
  const SequenceLayout& s = params.sequences;
  const int64_t tiles = count_slots(s, params.num_keys, kKeysPerGradientTile) * s.heads_kv;
  const Visibility& seen = params.visibility;
  int64_t queries = s.length_q;
  if (seen.window != Visibility::kNoWindow) {
    queries = min_of(queries, int64_t{seen.window} + kKeysPerGradientTile);
  }
  const int64_t rows = queries * s.group;
  const int64_t wanted = ceil_div(kWaves * kBlocksPerMultiprocessor * multiprocessors, max_of(tiles, 1));
  const int64_t rows_per_split = max_of(ceil_div(ceil_div(rows, wanted), 64) * 64, kLeastRows);
  const int64_t splits = max_of(ceil_div(rows, rows_per_split), 1);
  return {static_cast<int32_t>(splits), static_cast<int32_t>(rows_per_split),
          splits > 1 ? tiles * splits * kKeysPerGradientTile * tile_row_size(params.q.width, params.v.width) : 0};
}

// The queries that see each tile of keys, as what decides about splits sees them.
struct KeyTiles {
  int64_t count;        // of all sequences and KV heads
  int64_t of_sequence;  // as if all were one, where they are packed
  int64_t sample;       // one tile stands for so many
  int64_t queries;      // that may see one
  int64_t offset;       // from a query's number to its position
  bool window;
  Visibility seen;
  double scale;  // from what is counted over the sample to all tiles

  explicit KeyTiles(const RangeBackwardParams& params) : seen(params.visibility) {
    constexpr int64_t kSampledTiles = 32;
    const SequenceLayout& s = params.sequences;
    const int64_t slots = count_slots(s, params.num_keys, range_sm90::kKeysPerGradientTile);
    count = slots * s.heads_kv;
    window = seen.window != Visibility::kNoWindow;
    queries = window ? min_of(s.length_q, int64_t{seen.window} + range_sm90::kKeysPerGradientTile - 1) : s.length_q;
    offset = s.packed() ? 0 : s.offset;
    of_sequence = s.packed() ? slots : slots / max_of(s.batch, 1);
    sample = ceil_div(max_of(of_sequence, 1), kSampledTiles);
    scale = static_cast<double>(sample * s.heads_kv) * (s.packed() ? 1. : s.batch);
  }

  int64_t first_query(int64_t tile) const {
    const int64_t first = tile * range_sm90::kKeysPerGradientTile * seen.stride + seen.first_seen - offset;
    return window ? 0 : min_of(max_of(first, 0), queries);
  }
};

// Steps until the last block of threads ends: blocks of more than half the length run in rounds, shorter ones fill
// gaps, and every partial sum is written and read.
double steps_of_splits(const KeyTiles& tiles, int64_t split_queries, int32_t step_queries, bool several,
                       int multiprocessors) {
  constexpr double kItemSteps = 4;       // that starting and ending a block takes
  constexpr double kPartialSteps = 0.1;  // that a partial sum takes, of all multiprocessors' time
  int64_t whole = 0;
  int64_t rest = 0;  // queries of shorter items
  int64_t items = 0;
  for (int64_t tile = tiles.sample / 2; tile < tiles.of_sequence; tile += tiles.sample) {
    const int64_t first = tiles.first_query(tile);
    const int64_t first_split = first / split_queries;
    const int64_t count = max_of(ceil_div(tiles.queries, split_queries) - first_split, 1);
    items += count;
    const int64_t of_first = (first_split + 1) * split_queries - first;
    whole += 2 * of_first > split_queries ? count : count - 1;
    rest += 2 * of_first > split_queries ? 0 : of_first;
  }
  const double rounds = std::ceil(static_cast<double>(whole) * tiles.scale / multiprocessors);
  return rounds * (static_cast<double>(split_queries) / step_queries + kItemSteps) +
         static_cast<double>(rest) * tiles.scale / step_queries / multiprocessors +
         (several ? static_cast<double>(items) * tiles.scale * kPartialSteps : 0.);
}

// Of a few numbers of splits, the one whose last block is expected to end first.
RangeSplits split_rows_sm90(const RangeBackwardParams& params, int multiprocessors) {
  constexpr int64_t kMostSplits = 24;
  constexpr int64_t kMostPartialFloats = int64_t{64} << 20;
  const int32_t group = params.sequences.group;
  const int32_t step_queries = key_step_rows(params.q.width) / group;
  const KeyTiles tiles(params);
  const int64_t tile_floats = range_sm90::kKeysPerGradientTile * tile_row_size(params.q.width, params.v.width);
  RangeSplits best{1, 0, 0};
  double best_steps = 0;
  for (int64_t splits = 1; splits <= kMostSplits; ++splits) {
    const int64_t split_queries = max_of(ceil_div(ceil_div(tiles.queries, splits), step_queries) * step_queries, 1);
    const int64_t floats = splits > 1 ? tiles.count * splits * tile_floats : 0;
    if (splits > 1 && (floats > kMostPartialFloats || (splits - 1) * split_queries >= tiles.queries)) {
      continue;
    }
    const double steps = steps_of_splits(tiles, split_queries, step_queries, splits > 1, multiprocessors);
    if (best.rows_per_split == 0 || steps < best_steps) {
      best = {static_cast<int32_t>(splits), static_cast<int32_t>(split_queries * group), floats};
      best_steps = steps;
    }
  }
  return best;
}

constexpr KernelNames kForward{"forward_plain", "range_forward_sm80", "range_forward_sm90"};
constexpr KernelNames kQuery{"backward_query_plain", "range_backward_query_sm80", "range_backward_query_sm90"};
constexpr KernelNames kKeys{"backward_keys_plain", "range_backward_keys_sm80", "range_backward_keys_sm90"};
constexpr KernelNames kPartials{nullptr, "range_add_partials_sm80", "range_add_partials_sm90"};

KernelTile forward_tile(Machine machine, const TensorView& q, const TensorView& v) {
  const TileDims dims = tile_dims(q.width, v.width);
  return machine == Machine::kPlain  ? plain::forward_tile(plain::columns(q.width, v.width))
         : machine == Machine::kSm80 ? range_sm80::forward_tile(dims)
                                     : range_sm90::forward_tile(dims);
}
KernelTile query_tile(Machine machine, const TensorView& q, const TensorView& v) {
  const TileDims dims = tile_dims(q.width, v.width);
  return machine == Machine::kPlain  ? plain::backward_query_tile(plain::columns(q.width, v.width))
         : machine == Machine::kSm80 ? range_sm80::backward_query_tile(dims)
                                     : range_sm90::backward_query_tile(dims);
}
KernelTile keys_tile(Machine machine, const TensorView& q, const TensorView& v) {
  const TileDims dims = tile_dims(q.width, v.width);
  return machine == Machine::kPlain  ? plain::backward_keys_tile(plain::columns(q.width, v.width))
         : machine == Machine::kSm80 ? key_gradients_sm80::tile(dims)
                                     : range_sm90::backward_keys_tile(dims);
}

}  // namespace

RangeForwardPlan plan_range_forward(const RangeForwardParams& params, ElementType type, const Device& device) {
  const KernelChoice kernel = choose_kernel(type, device, forward_not_for_sm90(params));
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const GatedSum& sum = params.sum;
  const bool takes_sum = kernel.machine == Machine::kSm90 && sum.out != nullptr && aligned(sum.out) &&
                         aligned(sum.others[0]) && aligned(sum.others[1]) &&
                         range_sm90::takes_sum(tile_dims(params.q.width, params.v.width).k);
  RangeForwardPlan plan{.kernel = kernel, .takes_sum = takes_sum, .launches = {}};
  plan.launches.add(kForward.on(kernel.machine), forward_tile(kernel.machine, params.q, params.v));
  return plan;
}

RangeBackwardPlan plan_range_backward(const RangeBackwardParams& params, ElementType type, const Device& device,
                                      NeededGradients needed) {
  RangeBackwardPlan plan{.needed = needed,
                         .query = choose_kernel(type, device, query_not_for_sm90(params)),
                         .keys = choose_kernel(type, device, keys_not_for_sm90(params)),
                         .splits = {1, 0, 0},
                         .launches = {}};
  if (needed.query) {
    plan.launches.add(kQuery.on(plan.query.machine), query_tile(plan.query.machine, params.q, params.v));
  }
  if (!needed.keys) {
    return plan;
  }
  if (plan.keys.machine == Machine::kSm80) {
    plan.splits = split_rows_sm80(params, device.multiprocessors);
  } else if (plan.keys.machine == Machine::kSm90) {
    plan.splits = split_rows_sm90(params, device.multiprocessors);
  }
  plan.launches.add(kKeys.on(plan.keys.machine), keys_tile(plan.keys.machine, params.q, params.v));
  if (plan.splits.splits > 1) {
    plan.launches.add(kPartials.on(plan.keys.machine), {});
  }
  return plan;
}

}  // namespace nsa
