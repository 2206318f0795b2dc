// Tiles of the kernels that choose blocks, and their shared memory.
#pragma once

#include "common/tiles.h"
#include "selection/params.h"

namespace nsa {

constexpr int32_t kKeysPerTile = 64;         // compressed blocks whose probabilities are computed together
constexpr int32_t kRing = 128;               // a tile, and up to kMostPieces - 1 before it
constexpr int64_t kQueryRecordBytes = 1088;  // of what is known of a query: selection/ranking.cuh

namespace select_plain {

constexpr int32_t kWarps = 8;
constexpr KernelTile tile(int32_t width) {
  return {.rows = kWarps,
          .keys = kKeysPerTile,
          .stages = 1,
          .dynamic_bytes = kWarps * kQueryRecordBytes + kFloatBytes * kKeysPerTile * (width | 1)};
}

}  // namespace select_plain

namespace select_sm80 {

constexpr int32_t kWarps = 8;
constexpr int32_t kStages = 2;
constexpr int32_t kHeadsPerWarp = 32;
constexpr int64_t kWorkBytes = 128;
constexpr int32_t kQueries[] = {4, 2, 1};  // of a warp, of up to 8, 16 and 32 heads each
constexpr int32_t queries(int32_t group) { return kQueries[group <= 8 ? 0 : group <= 16 ? 1 : 2]; }

constexpr KernelTile tile(int32_t tile_k, int32_t queries_of_warp) {
  return {.rows = kWarps * queries_of_warp,
          .keys = kKeysPerTile,
          .stages = kStages,
          .dynamic_bytes =
              kHalfBytes * kStages * kKeysPerTile * tile_k + kQueryRecordBytes * kWarps * queries_of_warp + kWorkBytes};
}

}  // namespace select_sm80

namespace select_sm90 {

constexpr int32_t kMostHeads = 128;       // of a group
constexpr int32_t kSlots[] = {4, 8, 16};  // heads that a slot has room for
constexpr int32_t kLargestSlot = 16;
constexpr int32_t kListed[] = {16, 32, 64};  // blocks that a list has room for
constexpr int32_t kMostListed = 64;
constexpr int32_t kColumns = 128;  // of a consumer: slots of one query each
constexpr int32_t kQueue = 32;     // blocks that wait to be merged with a list
// Small slots of wide heads have room for shorter lists.
constexpr int32_t most_listed(int32_t tile_k, int32_t slot) { return tile_k > 128 && slot == 4 ? 32 : kMostListed; }

// Small slots have many lists: where ranking takes longer than the products of two consumers, twice as many warps rank.
// As many stages of keys and steps of strips as shared memory holds.
constexpr int32_t consumers(int32_t tile_k, int32_t slot, int32_t listed) {
  return slot == 4 || (slot == 8 && (tile_k > 128 || listed == 64)) ? 2 : 3;
}
constexpr int32_t stages(int32_t tile_k, int32_t slot) { return tile_k <= 128 && slot == kLargestSlot ? 4 : 2; }
constexpr int32_t strip_tiles(int32_t tile_k, int32_t slot, int32_t listed) {
  return slot < kLargestSlot ? (tile_k > 128 && slot == 4 ? 1 : 3) : tile_k > 128 ? 1 : listed == 64 ? 3 : 7;
}
// Of the strips of a query. Neighbours lie 16 banks apart: both are written without conflicts.
constexpr int32_t strip_pitch(int32_t ring) { return ring + 16; }

constexpr KernelTile tile(int32_t tile_k, int32_t slot, int32_t listed) {
  const int32_t groups = consumers(tile_k, slot, listed);
  const int32_t strips = strip_tiles(tile_k, slot, listed);
  const int64_t copied = kHalfBytes * tile_k * (groups * kColumns + stages(tile_k, slot) * kKeysPerTile);
  const int64_t pitch = strip_pitch((strips + 1) * kKeysPerTile);
  const int64_t of_slot = kFloatBytes * pitch + 2 * kFloatBytes * (kQueue + listed);
  const int64_t of_group = kColumns / slot * of_slot + kFloatBytes * 2 * kColumns;
  const int64_t barriers = 2 * kBarrierBytes * (groups + stages(tile_k, slot) + groups * strips);
  return {.rows = groups * kColumns / slot,
          .keys = kKeysPerTile,
          .stages = stages(tile_k, slot),
          .dynamic_bytes = round_up(copied + groups * of_group + round_up(kFloatBytes * groups, 8) + barriers, 1024)};
}

}  // namespace select_sm90
}  // namespace nsa
