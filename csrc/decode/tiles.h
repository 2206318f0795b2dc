// What the kernels of a decoding step work on at a time, and the shared memory that it takes.
#pragma once

#include "common/tiles.h"

namespace nsa {

constexpr int64_t kMostDecodeQueries = 8;  // of a sequence

namespace decode_tiles {

constexpr int32_t kChooseThreads = 512;
constexpr int32_t kChooseWarps = kChooseThreads / 32;
constexpr int32_t kMostColumns = 256;  // of an output
constexpr int64_t kOffsetBytes = 16;   // where a key and its value lie
constexpr int32_t kMostPartBlocks = 64;
constexpr int64_t kListBytes = 2 * kFloatBytes * kMostPartBlocks + 1;  // of a part, and whether it is the last
constexpr int64_t kChooseStaticBytes = 1280;
// Sums of two rows of kMostColumns for each warp.
constexpr int64_t kAddingBytes = kFloatBytes * kChooseWarps * kMostColumns;

// Of the choice: a factor for each head and split, a rank for each selection block.
constexpr KernelTile choose_tile(int64_t group, int64_t splits, int64_t blocks) {
  const int64_t bytes = kFloatBytes * (group * splits + blocks);
  return {.rows = 1, .dynamic_bytes = bytes > kAddingBytes ? bytes : kAddingBytes, .static_bytes = kChooseStaticBytes};
}

// Numbers from a row of kept scores to the next: a multiple of a chunk, and rows 8 banks apart.
constexpr int32_t kept_pitch(int32_t keys, int32_t chunk) { return (keys + chunk - 1) / chunk * chunk + 8; }

}  // namespace decode_tiles

// Tensor cores: rows in tiles of 16, keys in chunks that a ring of two holds.
namespace decode_sm80 {

constexpr int32_t kStages = 2;
constexpr int32_t kRowTiles[] = {1, 2};
constexpr int32_t chunk_keys(TileDims dims) { return dims.k <= 128 ? 64 : 32; }
// With few rows, a chunk of a tile of rows is shared by a warp for every 16 keys, else by two.
constexpr int32_t slices(int32_t row_tiles, int32_t keys) { return row_tiles == 1 ? keys / 16 : 2; }
constexpr int64_t ring_bytes(TileDims dims) { return kHalfBytes * kStages * chunk_keys(dims) * (dims.k + dims.v); }
constexpr int64_t query_bytes(TileDims dims, int32_t row_tiles) { return kHalfBytes * 16 * row_tiles * dims.k; }
constexpr int64_t exchange_bytes(int32_t row_tiles, int32_t slices) {
  return kFloatBytes * 16 * row_tiles * (2 * slices + 2);
}
constexpr int64_t offsets_bytes(TileDims dims, int32_t keys) {
  return decode_tiles::kOffsetBytes * round_up(keys, chunk_keys(dims));
}

// `split_keys` of compressed keys, whose scores are kept; `window_keys` of the window, whose are not.
constexpr KernelTile ranges_tile(TileDims dims, int32_t row_tiles, int32_t split_keys, int32_t window_keys) {
  const int32_t chunk = chunk_keys(dims);
  const int64_t kept = kFloatBytes * 16 * row_tiles * decode_tiles::kept_pitch(split_keys, chunk);
  const int64_t compressed = kept + offsets_bytes(dims, split_keys);
  const int64_t window = offsets_bytes(dims, window_keys);
  return {
      .rows = 16 * row_tiles,
      .keys = chunk,
      .stages = kStages,
      .dynamic_bytes = ring_bytes(dims) + query_bytes(dims, row_tiles) + (compressed > window ? compressed : window),
      .static_bytes = exchange_bytes(row_tiles, slices(row_tiles, chunk))};
}

constexpr KernelTile selected_tile(TileDims dims, int32_t row_tiles, int32_t part_keys) {
  const int32_t chunk = chunk_keys(dims);
  return {
      .rows = 16 * row_tiles,
      .keys = chunk,
      .stages = kStages,
      .dynamic_bytes = ring_bytes(dims) + query_bytes(dims, row_tiles) + offsets_bytes(dims, part_keys),
      .static_bytes = round_up(exchange_bytes(row_tiles, slices(row_tiles, chunk)) + decode_tiles::kListBytes, 128)};
}

}  // namespace decode_sm80

// Hopper: stages of 128 keys in a ring that one set of warps fills and another empties.
namespace decode_sm90 {

constexpr int32_t kStageKeys = 128;
constexpr int32_t kProducerWarps = 4;
constexpr int32_t kConsumerWarps = 8;
constexpr int32_t kThreads = 32 * (kProducerWarps + kConsumerWarps);
constexpr int32_t kRangesThreads = kThreads + 32 * kProducerWarps;  // some add up weights by selection blocks
constexpr int32_t kMostCluster = 8;
constexpr int32_t kMostCandidates = 1024;  // of all slices
constexpr int32_t kSliceBlocks = 128;      // that a warp chooses from, unless there are many
constexpr int32_t kCachedPages = 1024;     // of a sequence's table
constexpr int32_t kKeptPitch = kStageKeys + 4;
constexpr int32_t kMostSelectedRowTiles = 2;  // of one query
constexpr int32_t most_row_tiles(TileDims dims) { return dims.k <= 128 ? 4 : 2; }
constexpr int32_t row_tiles(TileDims dims, int64_t rows) {
  return rows <= 16 ? 1 : rows <= 32 ? 2 : most_row_tiles(dims);
}

constexpr int64_t stage_bytes(TileDims dims) { return kHalfBytes * kStageKeys * (dims.k + dims.v); }
constexpr int32_t range_stages(TileDims dims, int32_t row_tiles) {
  return dims.k + dims.v <= 128 ? (row_tiles == 1 ? 6 : 4) : dims.k <= 128 && row_tiles == 1 ? 3 : 2;
}
constexpr int32_t selected_stages(TileDims dims) { return dims.k + dims.v <= 128 ? 4 : 2; }

// Buffers of weights in float32, from the warps that compute them to those that add them up by selection blocks.
constexpr int32_t kept_buffers(int32_t row_tiles) { return row_tiles == 1 ? 2 : 1; }
constexpr int64_t query_bytes(TileDims dims, int32_t row_tiles) { return kHalfBytes * 16 * row_tiles * dims.k; }
constexpr int64_t weight_bytes(int32_t row_tiles) { return kHalfBytes * 16 * row_tiles * kStageKeys; }
constexpr int64_t exchange_bytes(int32_t row_tiles) { return kFloatBytes * 2 * kConsumerWarps * 16 * row_tiles; }
constexpr int64_t out_bytes(TileDims dims, int32_t row_tiles) { return kFloatBytes * 16 * row_tiles * dims.v; }

constexpr KernelTile ranges_tile(TileDims dims, int32_t row_tiles) {
  const int32_t stages = range_stages(dims, row_tiles);
  const int64_t kept = kFloatBytes * 16 * row_tiles * kKeptPitch * kept_buffers(row_tiles);
  return {.rows = 16 * row_tiles,
          .keys = kStageKeys,
          .stages = stages,
          .dynamic_bytes =
              round_up(stages * stage_bytes(dims) + 2 * query_bytes(dims, row_tiles) + weight_bytes(row_tiles) + kept +
                           exchange_bytes(row_tiles) + kBarrierBytes * (4 * stages + 4 + 2 * kept_buffers(row_tiles)),
                       128)};
}

// Besides the ring: the sum of the other two branches, all parts of the cluster, rows of both branches' splits.
constexpr KernelTile selected_tile(TileDims dims, int32_t row_tiles) {
  const int32_t stages = selected_stages(dims);
  const int64_t sums = 2 * out_bytes(dims, row_tiles) + 4 * kFloatBytes * kMostCluster +
                       2 * kFloatBytes * kMostCluster * 16 * row_tiles + 4 * kFloatBytes * 32 * kConsumerWarps;
  const int64_t rows = kFloatBytes * 7 * 16 * row_tiles;
  const int64_t lists = kFloatBytes * (kCachedPages + 64 + 10);
  return {
      .rows = 16 * row_tiles,
      .keys = kStageKeys,
      .stages = stages,
      .dynamic_bytes = round_up(stages * stage_bytes(dims) + query_bytes(dims, row_tiles) + weight_bytes(row_tiles) +
                                    exchange_bytes(row_tiles) + sums + rows + lists + kBarrierBytes * (4 * stages + 2),
                                128)};
}

}  // namespace decode_sm90

// Without tensor cores, any element: a warp for each key, then a thread for each column.
namespace decode_plain {

constexpr int32_t kThreads = 128;
constexpr int32_t kRows = 16;
constexpr int32_t kKeys = 32;

constexpr KernelTile ranges_tile(int32_t width_k, int32_t split_keys, int32_t window_keys) {
  const int32_t keys = split_keys > window_keys ? split_keys : window_keys;
  return {.rows = kRows,
          .keys = kKeys,
          .dynamic_bytes = kFloatBytes * kRows * (width_k + decode_tiles::kept_pitch(keys, kKeys)) +
                           decode_tiles::kOffsetBytes * round_up(keys, kKeys),
          .static_bytes = 2 * kFloatBytes * kRows};
}
constexpr KernelTile selected_tile(int32_t width_k, int32_t part_keys) {
  KernelTile tile = ranges_tile(width_k, part_keys, 0);
  tile.static_bytes = round_up(tile.static_bytes + decode_tiles::kListBytes, 128);
  return tile;
}

}  // namespace decode_plain
}  // namespace nsa
