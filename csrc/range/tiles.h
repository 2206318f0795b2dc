// Tiles of the kernels that attend over a range of keys, and their shared memory.
#pragma once

#include "common/tiles.h"

namespace nsa {

namespace range_sm80 {

constexpr int32_t kWarps = 4;
constexpr int64_t kForwardStaticBytes = 128;
// Times 16 rows of a warp: every right operand is used that often, so two are nearly twice as fast as one.
constexpr int32_t row_tiles(int32_t tile_k) { return tile_k <= 128 ? 2 : 1; }
// Rows of 128 columns leave room for 64 keys a step; wider ones for less.
constexpr int32_t forward_keys(int32_t tile_k) { return tile_k <= 192 ? 64 : 32; }
constexpr int32_t query_keys(int32_t tile_k) { return tile_k <= 128 ? 64 : 32; }
constexpr int32_t query_stages(int32_t tile_k) { return tile_k <= 192 ? 2 : 1; }

constexpr KernelTile forward_tile(TileDims dims) {
  const int32_t rows = 16 * kWarps * row_tiles(dims.k);
  const int32_t keys = forward_keys(dims.k);
  return {.rows = rows,
          .keys = keys,
          .stages = 1,
          .dynamic_bytes = kHalfBytes * (rows * dims.k + keys * (dims.k + dims.v)),
          .static_bytes = kForwardStaticBytes};
}
constexpr KernelTile backward_query_tile(TileDims dims) {
  const int32_t rows = 16 * kWarps;
  const int32_t keys = query_keys(dims.k);
  const int32_t stages = query_stages(dims.k);
  return {.rows = rows,
          .keys = keys,
          .stages = stages,
          .dynamic_bytes = kHalfBytes * (rows + stages * keys) * (dims.k + dims.v)};
}

}  // namespace range_sm80

namespace range_sm90 {

constexpr int32_t kGroupRows = kWarpgroupRows;
constexpr int64_t kKeysPerGradientTile = 128;  // of a block of threads that sums gradients of keys
// Rows of a warpgroup that whole queries fill.
constexpr int32_t filled_rows(int32_t group) { return kGroupRows / group * group; }
// Rows of a step of the gradients of keys, and stages of them.
constexpr int32_t key_step_rows(int32_t tile_k) { return tile_k <= 128 ? 64 : 32; }
constexpr int32_t key_stages(int32_t tile_k) { return tile_k <= 64 ? 6 : 4; }

// Three warpgroups with as many keys a step as their registers hold are the fastest: docs/notes/hopper_range.md.
constexpr int32_t kForwardGroups = 3;
constexpr int32_t kForwardStages = 2;
constexpr int32_t kForwardTiles = 4;  // whose numbers are kept
constexpr int64_t kForwardTileBytes = 48;
constexpr int32_t forward_keys(int32_t tile_k) { return tile_k <= 64 ? 96 : 80; }
constexpr int32_t forward_q_stages(int32_t tile_k) { return tile_k <= 128 ? 2 : 1; }
// Whether the forward kernel has room for the rows of the other branches.
constexpr bool takes_sum(int32_t tile_k) { return forward_q_stages(tile_k) == 2; }

constexpr KernelTile forward_tile(TileDims dims) {
  constexpr int32_t kRows = kForwardGroups * kGroupRows;
  const int32_t keys = forward_keys(dims.k);
  const int32_t q_stages = forward_q_stages(dims.k);
  const int64_t rows = kHalfBytes * kRows * (q_stages * dims.k + dims.v);
  const int64_t ring = kHalfBytes * kForwardStages * keys * (dims.k + dims.v);
  const int64_t gates = takes_sum(dims.k) ? kFloatBytes * 3 * kRows : 16;
  const int64_t barriers = 2 * kBarrierBytes * (kForwardTiles + q_stages + 2 * kForwardStages + 2);
  return {.rows = kRows,
          .keys = keys,
          .stages = kForwardStages,
          .dynamic_bytes = rows + ring + round_up(kForwardTileBytes * kForwardTiles + gates + barriers, 1024)};
}

// Three warpgroups where their registers hold the sums: docs/notes/hopper_query_gradient.md.
struct QuerySizes {
  int32_t groups;
  int32_t keys;
  int32_t row_slots;  // for the rows of a warpgroup
  int32_t k_stages;
  int32_t v_stages;
};
constexpr QuerySizes query_sizes(int32_t tile_k) {
  return tile_k <= 64    ? QuerySizes{3, 80, 6, 4, 4}
         : tile_k <= 128 ? QuerySizes{3, 64, 4, 3, 3}
                         : QuerySizes{2, 80, 2, 3, 2};
}
constexpr KernelTile backward_query_tile(TileDims dims) {
  const QuerySizes sizes = query_sizes(dims.k);
  const int64_t rows = kHalfBytes * sizes.row_slots * kGroupRows * (dims.k + dims.v);
  const int64_t ring = kHalfBytes * sizes.keys * (sizes.k_stages * dims.k + sizes.v_stages * dims.v);
  return {.rows = sizes.groups * kGroupRows,
          .keys = sizes.keys,
          .stages = sizes.k_stages,
          .dynamic_bytes = rows + ring + 1024};
}

constexpr KernelTile backward_keys_tile(TileDims dims) {
  const int32_t rows = key_step_rows(dims.k);
  return {.rows = rows,
          .keys = static_cast<int32_t>(kKeysPerGradientTile),
          .stages = key_stages(dims.k),
          .dynamic_bytes = kHalfBytes * kKeysPerGradientTile * (dims.k + dims.v) +
                           row_ring_bytes(dims, rows, key_stages(dims.k)) + 1024};
}

}  // namespace range_sm90
}  // namespace nsa
