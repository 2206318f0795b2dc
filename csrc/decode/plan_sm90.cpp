#include "decode/plan_sm90.h"

#include <algorithm>

#include "common/dispatch.h"

namespace nsa {
namespace {

int64_t count_stages(const DecodeParams& p) {
  return std::max<int64_t>(ceil_div(selection_blocks(p), decode_sm90::kStageKeys / p.pieces), 1);
}
// Queries see windows of their own: the first one's begin and the last one's end.
int64_t window_stages(const DecodeParams& p) {
  const int64_t seen = std::min<int64_t>(int64_t{p.window} + p.queries - 1, p.max_tokens);
  return std::max<int64_t>(ceil_div(seen, decode_sm90::kStageKeys), 1);
}

// Blocks of threads that share a query's choice: all clusters run at once. Those of three or more do not find room on
// every multiprocessor, since a cluster lies within a part of the GPU.
int32_t cluster_of(const DecodeParams& p, int32_t num_splits, const Device& device) {
  const int64_t most = std::min(decode_sm90::kMostCluster, p.num_selected);
  if (num_splits > 0) {
    return static_cast<int32_t>(std::min<int64_t>(4, most));
  }
  const int64_t queries = int64_t{p.units()} * p.queries;
  const int64_t fitting = device.multiprocessors * 9 / 10 / queries;
  return static_cast<int32_t>(std::clamp<int64_t>(fitting >= 3 ? fitting : device.multiprocessors / queries, 1, most));
}

// Lays out what a block of threads needs for its part of the choice. Returns whether there is room.
bool lay_out_choice(DecodeParams& p, TileDims dims) {
  const int64_t ring = decode_sm90::selected_stages(dims) * decode_sm90::stage_bytes(dims);
  const int64_t blocks = ceil_div(selection_blocks(p), p.cluster);
  const int64_t parts = p.fixed_splits > 0 ? 2 * int64_t{p.fixed_splits}
                                           : std::min<int64_t>(p.range_blocks, p.stages) +
                                                 std::min<int64_t>(p.range_blocks, window_stages(p)) + 2;
  const int64_t stages = std::min<int64_t>(ceil_div(blocks, p.stage_blocks) + 2, p.stages);
  const int64_t candidates = decode_sm90::kMostCandidates + 64 * decode_sm90::kThreads / 32 + blocks;
  p.choice_sums = static_cast<int32_t>(round_up(2 * kFloatBytes * candidates, 16));
  p.choice_factors = static_cast<int32_t>(round_up(p.choice_sums + 2 * kFloatBytes * parts * p.group, 16));
  p.choice_weights = static_cast<int32_t>(p.choice_factors + kFloatBytes * stages * p.padded_group);
  const int64_t of_stage = kFloatBytes * p.weights_of_stage() * p.padded_group;
  p.choice_stages = static_cast<int32_t>(std::min((ring - p.choice_weights) / of_stage, stages));
  return p.choice_stages >= std::min<int64_t>(2, stages);
}

}  // namespace

const char* not_for_decode_sm90(const DecodeParams& p, const Device& device) {
  const TileDims dims = tile_dims(p.q.width, p.out.width);
  if (!has_sm90_kernels(dims.k)) {
    return kDimsTooLarge;
  }
  if (device.shared_bytes < kHopperSharedBytes) {
    return kTooLittleShared;
  }
  if (p.group > 16 * decode_sm90::kMostSelectedRowTiles) {
    return "the decoding kernels for compute capability 9.0 take groups of at most 32 heads";
  }
  // Numbers of stages times those of blocks of threads are numbers of 32 bits.
  if (int64_t{p.units()} * ceil_div(p.rows(), 16) * (count_stages(p) + window_stages(p)) > (1 << 22)) {
    return "the sequences have too many keys together";
  }
  return nullptr;
}

bool cut_decode_for_sm90(DecodePlan& plan, DecodeParams& p, int32_t num_splits, const Device& device) {
  const TileDims dims = tile_dims(p.q.width, p.out.width);
  plan.row_tiles = decode_sm90::row_tiles(dims, p.rows());
  plan.part_row_tiles = decode_sm90::row_tiles(dims, p.group);
  p.tile_queries = std::min(16 * plan.row_tiles / p.group, p.queries);
  p.by_tile_queries = Divisor(static_cast<uint32_t>(p.tile_queries));
  p.tile_rows = p.tile_queries * p.group;
  p.row_tiles = static_cast<int32_t>(ceil_div(p.queries, p.tile_queries));
  p.by_row_tiles = Divisor(static_cast<uint32_t>(p.row_tiles));
  p.padded_group = static_cast<int32_t>(round_up(p.group, 4));
  p.by_fours = Divisor(static_cast<uint32_t>(p.padded_group / 4));
  p.spill_blocks = static_cast<int32_t>(ceil_div(p.covered - 1, p.pieces));
  p.stage_blocks = decode_sm90::kStageKeys / p.pieces;
  p.by_stage_blocks = Divisor(static_cast<uint32_t>(p.stage_blocks));
  p.by_stage_keys = Divisor(static_cast<uint32_t>(p.stage_keys()));
  p.stages = static_cast<int32_t>(count_stages(p));
  const int32_t ranges = 2 * p.units() * p.row_tiles;
  if (num_splits > 0) {
    p.split_stages = std::max(p.stages / num_splits, 1);
    const int64_t most = std::max<int64_t>(p.stages, window_stages(p));
    p.fixed_splits = static_cast<int32_t>(ceil_div(most, p.split_stages));
    p.items = ranges * p.fixed_splits;
    p.range_blocks = std::min(p.items, device.multiprocessors);
    p.range_slots = p.items;
  } else {
    p.range_blocks = static_cast<int32_t>(
        std::min<int64_t>(int64_t{p.units()} * p.row_tiles * (p.stages + window_stages(p)), device.multiprocessors));
    p.range_slots = p.range_blocks + ranges;
  }
  p.cluster = cluster_of(p, num_splits, device);
  p.part_blocks = static_cast<int32_t>(ceil_div(p.num_selected, p.cluster));
  p.parts = 0;
  const int64_t most_slices = decode_sm90::kMostCandidates / (int64_t{p.cluster} * p.num_selected);
  p.slices = static_cast<int32_t>(std::clamp<int64_t>(
      ceil_div(selection_blocks(p), int64_t{p.cluster} * decode_sm90::kSliceBlocks), 1, most_slices));
  if (!lay_out_choice(p, dims)) {
    p.stages = 0;
    plan.kernel = {Machine::kSm80, "the choice is among more blocks than shared memory holds"};
    return false;
  }
  plan.launches = {};
  plan.launches.add("decode_ranges_sm90", decode_sm90::ranges_tile(dims, plan.row_tiles));
  plan.launches.add("decode_selected_sm90", decode_sm90::selected_tile(dims, plan.part_row_tiles));
  return true;
}

}  // namespace nsa
