// Tiles of the kernels that attend over listed blocks, and their shared memory.
#pragma once

#include "common/tiles.h"
#include "selected/params.h"

namespace nsa {

// The portable kernels of the output and of the gradient of q (selected/sm80/token.cuh).
namespace selected_sm80 {

constexpr int32_t kWarps = 4;
constexpr int32_t kRows = 16;
constexpr int32_t kWarpKeys = 16;  // that each warp takes at a time
constexpr int32_t kMostStages = 2;
constexpr int64_t kForwardStaticBytes = 640;  // maxima and totals of every warp's rows, and the number of blocks
constexpr int64_t kQueryStaticBytes = 128;

constexpr int64_t token_bytes(TileDims dims, int32_t stages) {
  return kHalfBytes * (kRows * dims.k + kWarps * stages * kWarpKeys * (dims.k + dims.v));
}
constexpr int64_t list_bytes(int64_t num_selected) { return 4 * num_selected; }

constexpr KernelTile forward_tile(TileDims dims, int32_t stages, int64_t num_selected) {
  return {.rows = kRows,
          .keys = kWarps * kWarpKeys,
          .stages = stages,
          .dynamic_bytes = token_bytes(dims, stages) + list_bytes(num_selected),
          .static_bytes = kForwardStaticBytes};
}
constexpr KernelTile backward_query_tile(TileDims dims, int32_t stages, int64_t num_selected) {
  KernelTile tile = forward_tile(dims, stages, num_selected);
  tile.dynamic_bytes += kHalfBytes * kRows * dims.v;
  tile.static_bytes = kQueryStaticBytes;
  return tile;
}
constexpr int64_t most_bytes(TileDims dims, int32_t stages, int64_t num_selected) {
  const int64_t forward = forward_tile(dims, stages, num_selected).shared_bytes();
  const int64_t query = backward_query_tile(dims, stages, num_selected).shared_bytes();
  return forward > query ? forward : query;
}

// The fewest stages that there are kernels with: one where a list as `select_blocks` makes it leaves no room for two in
// the least shared memory that a GPU has.
constexpr int32_t least_stages(TileDims dims) {
  constexpr int32_t kBlocks = 64;
  return most_bytes(dims, kMostStages, kBlocks) <= kLeastSharedBytes ? kMostStages : 1;
}

}  // namespace selected_sm80

// Kernels for Hopper that walk the union of the lists of a tile of queries: the rows of a query, and lists of up to 16
// blocks or of more.
enum class UnionKind {
  kNarrow,  // 16 rows, up to 16 blocks
  kLong,    // 16 rows
  kWide,    // 8 rows, or 16 in turn
  kWidest,  // 4 rows, up to 16 blocks
};

namespace selected_sm90 {

constexpr int32_t kBlockKeys = 64;        // keys of a selection block
constexpr int32_t kMostSelected = 64;     // blocks of a list
constexpr int32_t kMostNarrow = 16;       // of a short one
constexpr int32_t kMostBlocks = 1 << 16;  // of a sequence
constexpr int32_t kMostWidestBlocks = 1 << 12;

// Warpgroups that consume, and stages of the blocks that pass by.
struct UnionSizes {
  int32_t groups;
  int32_t stages_k;
  int32_t stages_v;
};
constexpr UnionSizes forward_sizes(int32_t tile_k, int32_t head_slots, bool long_lists) {
  const bool narrow = head_slots == 16;
  return tile_k == 64    ? UnionSizes{3, narrow ? 13 : 12, narrow ? 13 : 12}
         : tile_k == 128 ? UnionSizes{3, long_lists ? 6 : 7, long_lists ? 6 : 7}
                         : UnionSizes{3, narrow ? 4 : 3, 3};
}
constexpr UnionSizes query_sizes(int32_t tile_k, bool wide) {
  return tile_k == 64    ? UnionSizes{2, wide ? 12 : 13, wide ? 12 : 13}
         : tile_k == 128 ? UnionSizes{2, wide ? 6 : 7, wide ? 6 : 7}
                         : UnionSizes{2, 4, wide ? 3 : 4};
}
// Of the gradient of q from scores that were handed over: of keys alone.
constexpr UnionSizes handed_sizes(int32_t tile_k, bool wide) {
  return tile_k == 64    ? UnionSizes{4, 20, 1}
         : tile_k == 128 ? UnionSizes{wide ? 3 : 4, wide ? 11 : 13, 1}
                         : UnionSizes{3, wide ? 7 : 8, 1};
}

// Which kernel of a walk: the rows of a token where it is compiled for them, whether its tiles may have more than 12
// tokens, whether rows have a gradient, and whether only keys pass by.
struct UnionTraits {
  bool wide;
  bool gradients;
  bool only_keys;
};
constexpr KernelTile union_tile(TileDims dims, const UnionSizes& sizes, const UnionTraits& traits, int32_t head_slots,
                                int64_t num_selected) {
  const int64_t block_v = traits.only_keys ? 0 : kHalfBytes * kBlockKeys * dims.v;
  const int64_t block_k = kHalfBytes * kBlockKeys * dims.k;
  const int64_t of_rows = traits.only_keys || dims.k <= 128 ? 0 : kHalfBytes * kWarpgroupRows * dims.k;  // Q
  const int64_t grad_lse = traits.gradients ? int64_t{sizes.groups} * kWarpgroupRows : 1;
  const int64_t barriers = round_up(
      2 * kBarrierBytes * (sizes.stages_k + sizes.stages_v + 2) + kFloatBytes * (4 + 4 * sizes.groups + grad_lse), 8);
  const int64_t step = traits.wide || sizes.groups == 4 ? 8 : 4;
  const int64_t tokens = int64_t{sizes.groups} * (kWarpgroupRows / head_slots);
  return {.rows = sizes.groups * kWarpgroupRows,
          .keys = kBlockKeys,
          .stages = sizes.stages_k,
          .dynamic_bytes = sizes.stages_k * block_k + sizes.stages_v * block_v + sizes.groups * of_rows + barriers +
                           tokens * num_selected * (2 * step + 4)};
}

// Rows of a token.
constexpr int32_t head_slots_of(UnionKind kind, int32_t group) {
  return kind == UnionKind::kNarrow || kind == UnionKind::kLong || (kind == UnionKind::kWide && group > 8) ? 16
         : kind == UnionKind::kWide                                                                        ? 8
                                                                                                           : 4;
}
constexpr bool is_wide(UnionKind kind) { return kind == UnionKind::kWide || kind == UnionKind::kWidest; }

constexpr KernelTile forward_tile(TileDims dims, UnionKind kind, int64_t num_selected) {
  const int32_t head_slots = head_slots_of(kind, 1);
  const bool long_lists = is_wide(kind) || (kind == UnionKind::kLong && dims.k == 128);  // elsewhere both fit
  return union_tile(dims, forward_sizes(dims.k, head_slots, long_lists), {is_wide(kind), false, false}, head_slots,
                    num_selected);
}
constexpr KernelTile backward_query_tile(TileDims dims, UnionKind kind, int32_t group, int64_t num_selected) {
  return union_tile(dims, query_sizes(dims.k, is_wide(kind)), {is_wide(kind), true, false}, head_slots_of(kind, group),
                    num_selected);
}
constexpr KernelTile handed_tile(TileDims dims, UnionKind kind, int32_t group, int64_t num_selected) {
  return union_tile(dims, handed_sizes(dims.k, is_wide(kind)), {is_wide(kind), false, true}, head_slots_of(kind, group),
                    num_selected);
}

// Rows of a step of the gradients of keys: as many as two rings of at least three stages leave room for beside K and V.
constexpr int32_t key_step_rows(int32_t tile_k) { return tile_k <= 64 ? 64 : tile_k <= 128 ? 48 : 32; }
constexpr int32_t key_stages(int32_t tile_k) { return tile_k <= 64 ? 5 : 3; }
constexpr int32_t kParts = 2;  // warpgroups, each with a block of its own

constexpr KernelTile backward_keys_tile(TileDims dims) {
  constexpr int64_t kPlaces = 344;  // barriers, and what both pieces in turn are
  const int32_t rows = key_step_rows(dims.k);
  const int32_t stages = key_stages(dims.k);
  const int64_t part = kHalfBytes * kBlockKeys * (dims.k + dims.v) + row_ring_bytes(dims, rows, stages) +
                       round_up(kFloatBytes * stages * (rows + 1) + kPlaces, 1024);
  return {.rows = rows, .keys = kParts * kBlockKeys, .stages = stages, .dynamic_bytes = kParts * part};
}

}  // namespace selected_sm90

// Turning lists round (selected/cuda/lists.cu). What it takes to add up over a block of threads is CUB's business: at
// most this much.
namespace list_tiles {

constexpr int32_t kThreads = 256;
constexpr int32_t kScanThreads = 1024;
constexpr int64_t kScanBytes = 4256;
constexpr int32_t kKinds = 256;  // of pieces, of either sort

constexpr KernelTile kCountSegments{.static_bytes = 2 * kScanBytes};
constexpr KernelTile kListPieces{.static_bytes = kScanBytes + kFloatBytes * (2 * kKinds + 2)};

}  // namespace list_tiles
}  // namespace nsa
