#include "decode/plan.h"

#include <algorithm>

#include "common/dispatch.h"
#include "decode/plan_sm90.h"

namespace nsa {
namespace {

constexpr int64_t kLeastSplitKeys = 128;
constexpr int64_t kMostSplitKeys = 512;

// Few keys in all: short splits, for more blocks of threads; many: long ones, whose partial sums weigh less.
int64_t split_keys(const DecodeParams& p) {
  const int64_t keys = int64_t{p.units()} * ceil_div(p.rows(), 16) * (p.max_tokens / p.block_stride);
  return keys <= 4096 ? kLeastSplitKeys : keys <= 65536 ? 256 : kMostSplitKeys;
}

void cut_ranges(DecodeParams& p, int32_t num_splits, int64_t most_keys) {
  const int64_t blocks = selection_blocks(p);
  p.spill_blocks = static_cast<int32_t>(ceil_div(p.covered - 1, p.pieces));
  const int64_t wanted = num_splits > 0 ? ceil_div(blocks, num_splits) : split_keys(p) / p.pieces;
  const int64_t most = std::max<int64_t>(most_keys / p.pieces, 1);
  p.split_blocks = static_cast<int32_t>(std::max({std::min(wanted, most), int64_t{1}, int64_t{p.spill_blocks}}));
  p.by_split_blocks = Divisor(static_cast<uint32_t>(p.split_blocks));
  p.splits = static_cast<int32_t>(std::max<int64_t>(ceil_div(blocks, p.split_blocks), 1));
  p.window_split_keys = num_splits == 0 && p.split_keys() <= kLeastSplitKeys ? 64 : 128;
  // Queries see windows of their own: the first one's begin and the last one's end.
  const int64_t seen = std::min<int64_t>(int64_t{p.window} + p.queries - 1, p.max_tokens);
  p.window_splits = static_cast<int32_t>(std::max<int64_t>(ceil_div(seen, p.window_split_keys), 1));
}

void cut_parts(DecodeParams& p, int32_t num_splits) {
  const int32_t keys = num_splits == 0 && p.units() * p.queries <= 8 ? 128 : 256;
  p.part_blocks = std::clamp(keys / p.select_size, 1, std::min(p.num_selected, decode_tiles::kMostPartBlocks));
  p.parts = static_cast<int32_t>(ceil_div(p.num_selected, p.part_blocks));
  const int64_t rows = int64_t{p.units()} * p.rows();
  p.adding_warps = num_splits > 0 ? 8 : rows >= 2048 ? 4 : rows >= 512 ? 8 : 16;
}

bool suits_tensor_cores(const DecodeParams& p) {
  return p.compressed.aligned && p.selected.aligned && p.windowed.aligned && copies_by_map(p.q, 1, 1, 1) &&
         p.q.token_stride % 8 == 0 && p.q.head_stride % 8 == 0 && p.q.batch_stride % 8 == 0 && p.out.width % 8 == 0;
}

void list_launches(DecodePlan& plan, const DecodeParams& p) {
  const bool plain = plan.kernel.machine == Machine::kPlain;
  const TileDims dims = tile_dims(p.q.width, p.out.width);
  const int32_t part_keys = p.part_blocks * p.select_size;
  plan.launches = {};
  plan.launches.add(plain ? "decode_ranges_plain" : "decode_ranges_sm80",
                    plain ? decode_plain::ranges_tile(p.q.width, p.split_keys(), p.window_split_keys)
                          : decode_sm80::ranges_tile(dims, plan.row_tiles, p.split_keys(), p.window_split_keys));
  plan.launches.add("decode_choose", decode_tiles::choose_tile(p.group, p.splits, selection_blocks(p)));
  plan.launches.add(plain ? "decode_selected_plain" : "decode_selected_sm80",
                    plain ? decode_plain::selected_tile(p.q.width, part_keys)
                          : decode_sm80::selected_tile(dims, plan.part_row_tiles, part_keys));
}

// Numbers of each part of the workspace, in their order.
struct Workspace {
  int64_t range_out, range_sums, weights, stage_weights, stage_highest, gated, part_out, part_sums;
  int64_t finished, lists;

  explicit Workspace(const DecodeParams& p) {
    const int64_t units = p.units();
    const bool in_stages = p.stages > 0;
    const int64_t split_rows = in_stages ? int64_t{p.range_slots} * p.tile_rows : units * p.all_splits() * p.rows();
    const int64_t part_rows = units * p.queries * p.parts * p.group;
    range_out = split_rows * p.columns;
    range_sums = round_up(2 * split_rows, 4);
    weights = in_stages ? 0 : round_up(units * p.rows() * p.splits * p.weights_of_split(), 4);
    stage_highest = units * p.stages * p.padded_rows();
    stage_weights = in_stages ? stage_highest * p.weights_of_stage() : 0;
    gated = in_stages ? 0 : units * p.rows() * p.columns;
    part_out = part_rows * p.columns;
    part_sums = 2 * part_rows;
    finished = units * p.queries;
    lists = units * p.queries * p.num_selected;
  }
  int64_t floats() const {
    return range_out + range_sums + weights + stage_weights + stage_highest + gated + part_out + part_sums;
  }
};

DecodePlan with_workspace(DecodePlan plan, const DecodeParams& params) {
  const Workspace workspace(params);
  plan.floats = workspace.floats();
  plan.ints = workspace.finished + 2 * workspace.lists;
  return plan;
}

}  // namespace

int64_t most_decode_tokens(const DecodeParams& params, const Device& device) {
  if (params.stages > 0) {
    return params.max_tokens;  // kernels for Hopper are chosen where they have room
  }
  // A factor for each head and split of the fewest keys, and a rank for each block.
  const double of_block = 4. + 4. * params.group / params.split_blocks;
  const double blocks = static_cast<double>(device.shared_bytes - decode_tiles::kChooseStaticBytes) / of_block;
  return static_cast<int64_t>(blocks) * params.select_size;
}

DecodePlan plan_decode(DecodeParams& params, ElementType type, int32_t num_splits, const Device& device) {
  DecodePlan plan{};
  params.covered = params.block_size / params.block_stride;
  params.pieces = params.select_size / params.block_stride;
  params.by_block_stride = Divisor(static_cast<uint32_t>(params.block_stride));
  plan.kernel = choose_kernel(type, device, not_for_decode_sm90(params, device));
  if (type != ElementType::kFloat32 && !suits_tensor_cores(params)) {
    plan.kernel = {Machine::kPlain, "addresses, strides and widths are not multiples of 16 bytes"};
  }
  const bool plain = plan.kernel.machine == Machine::kPlain;
  params.columns =
      plain ? static_cast<int32_t>(round_up(params.out.width, 4)) : tile_dims(params.q.width, params.out.width).v;
  if (plan.kernel.machine == Machine::kSm90 && cut_decode_for_sm90(plan, params, num_splits, device)) {
    return with_workspace(plan, params);
  }
  plan.row_tiles = params.rows() <= 16 ? 1 : 2;
  plan.part_row_tiles = params.group <= 16 ? 1 : 2;
  // Kept scores may take less shared memory than the GPU has.
  for (int64_t most = kMostSplitKeys;; most /= 2) {
    cut_ranges(params, num_splits, most);
    cut_parts(params, num_splits);
    list_launches(plan, params);
    if (plan.launches.of[0].tile.shared_bytes() <= device.shared_bytes || most <= params.pieces) {
      break;
    }
  }
  while (params.part_blocks > 1 && plan.launches.of[2].tile.shared_bytes() > device.shared_bytes) {
    params.part_blocks = (params.part_blocks + 1) / 2;
    params.parts = static_cast<int32_t>(ceil_div(params.num_selected, params.part_blocks));
    list_launches(plan, params);
  }
  return with_workspace(plan, params);
}

void place_workspace(DecodeParams& params, float* floats, int32_t* ints) {
  const Workspace workspace(params);
  params.range_out = floats;
  params.range_sums = reinterpret_cast<RowSums*>(params.range_out + workspace.range_out);
  params.weights = params.range_out + workspace.range_out + workspace.range_sums;
  params.stage_weights = params.weights + workspace.weights;
  params.stage_highest = params.stage_weights + workspace.stage_weights;
  params.gated = params.stage_highest + workspace.stage_highest;
  params.part_out = params.gated + workspace.gated;
  params.part_sums = reinterpret_cast<RowSums*>(params.part_out + workspace.part_out);
  params.finished = ints;
  params.block_indices = ints + workspace.finished;
  params.block_pages = params.block_indices + workspace.lists;
}

}  // namespace nsa
