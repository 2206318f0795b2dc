// What the kernels of a decoding step are told: few queries of many sequences, whose keys lie in pages.
//
// A unit is a sequence and a KV head. Its rows are numbered query * G + head. Its compressed keys are cut into splits,
// each of whole selection blocks; its window into splits as well; the chosen blocks of a query into parts.
#pragma once

#include "common/params.h"

namespace nsa {

// Keys or values in pages: (pages, rows of a page, Hkv, D). Strides count elements; D's is 1.
struct PagedView {
  void* data;
  int64_t page_stride;
  int64_t row_stride;
  int64_t head_stride;
  int32_t width;  // D
  int32_t pages;  // of the pool: what a table may name
};

// The rows of one branch: where row r of a sequence lies is pages[r / rows_per_page], row r % rows_per_page of it.
struct PagedRows {
  PagedView k;
  PagedView v;
  const int32_t* table;  // (B, width)
  int64_t table_stride;
  int32_t table_width;
  int32_t rows_per_page;
  Divisor by_page;
  bool aligned;  // addresses and strides are multiples of 16 bytes
};

// A number pair for each row: the highest score, and the sum of 2^(score - highest). Scores are in units of log2(e).
struct RowSums {
  float highest;
  float sum;
};

struct DecodeParams {
  int32_t batch;
  int32_t heads_kv;
  int32_t group;    // G
  int32_t queries;  // Tq, the most of a sequence
  Divisor by_group;
  Divisor by_heads_kv;
  const int32_t* cumulative_q;   // (B + 1,), or null: every sequence has Tq queries
  const int32_t* cache_seqlens;  // (B,) tokens of a sequence, its queries' own included

  float scale_log2;  // the softmax scale times log2(e)
  int32_t block_size;
  int32_t block_stride;
  int32_t select_size;
  int32_t num_selected;
  ForcedBlocks forced;
  int32_t window;
  int32_t covered;  // strides of a compressed block, l / d
  int32_t pieces;   // strides of a selection block, l' / d
  Divisor by_block_stride;
  Divisor by_select_size;

  TensorView q;    // (B, Tq, Hq, Dk), or packed
  TensorView out;  // (B, Tq, Hq, Dv), or packed
  GatesView gates;
  PagedRows compressed;
  PagedRows selected;
  PagedRows windowed;

  // How the work is cut.
  int32_t max_tokens;         // that the tables have room for
  int32_t split_blocks;       // selection blocks of a split of compressed keys
  int32_t splits;             // of compressed keys
  int32_t window_split_keys;  // keys of a split of the window
  int32_t window_splits;
  Divisor by_split_blocks;
  int32_t spill_blocks;  // blocks after a split that its last keys reach into
  int32_t part_blocks;   // chosen blocks of a part
  int32_t parts;
  int32_t adding_warps;  // that add up the splits of a row: 1 to 16, a power of two
  int32_t columns;       // of a row in the workspace: Dv, rounded up to a tile's

  // On Hopper, else 0: a split is made of stages, each of whole selection blocks.
  int32_t stage_blocks;  // selection blocks of a stage
  int32_t stages;        // of the compressed keys that the tables have room for
  int32_t row_tiles;     // tiles of rows of a unit
  int32_t range_blocks;  // of threads, that share all stages
  int32_t fixed_splits;  // of a range's stages, or 0: shares are equal
  int32_t split_stages;  // of a fixed split
  int32_t items;         // ranges times fixed splits
  int32_t range_slots;   // of partial sums, each of a tile of rows
  int32_t tile_queries;  // whole queries of a tile of rows
  int32_t tile_rows;     // theirs
  int32_t cluster;       // blocks of threads that share a query's choice
  int32_t slices;        // of the blocks that each of them ranks
  int32_t padded_group;  // G, rounded up to a multiple of four
  Divisor by_fours;      // padded_group / 4
  // In shared memory of a block of threads that chooses, from the ring on, in bytes.
  int32_t choice_sums;     // (parts, G) RowSums
  int32_t choice_factors;  // (stages, padded_group)
  int32_t choice_weights;  // (choice_stages, stage_blocks + spill_blocks, padded_group)
  int32_t choice_stages;   // at a time
  Divisor by_stage_blocks;
  Divisor by_stage_keys;
  Divisor by_row_tiles;
  Divisor by_tile_queries;

  // Workspace, float32. R = Tq G rows, S = splits, then window_splits.
  float* range_out;        // (units, S, R, columns); on Hopper (range_slots, tile_rows, columns)
  RowSums* range_sums;     // (units, S, R); on Hopper (range_slots, tile_rows)
  float* weights;          // (units, R, splits, split_blocks + spill_blocks)
  float* stage_weights;    // (units, stages, stage_blocks + spill_blocks, Tq, padded_group), to stage_highest
  float* stage_highest;    // (units, stages, Tq, padded_group)
  float* gated;            // (units, R, columns): the compressed and the window branch, with their gates
  float* part_out;         // (units, Tq, parts, G, columns)
  RowSums* part_sums;      // (units, Tq, parts, G)
  int32_t* finished;       // (units, Tq): parts that are done
  int32_t* block_indices;  // (units, Tq, n): the choice
  int32_t* block_pages;    // (units, Tq, n): the page of each
  int32_t* faults;         // set to 1 where a table names a page that the pool lacks; or null

  NSA_HOST_DEVICE int32_t rows() const { return queries * group; }
  NSA_HOST_DEVICE int32_t units() const { return batch * heads_kv; }
  NSA_HOST_DEVICE int32_t all_splits() const { return splits + window_splits; }
  NSA_HOST_DEVICE int32_t weights_of_split() const { return split_blocks + spill_blocks; }
  NSA_HOST_DEVICE int32_t split_keys() const { return split_blocks * pieces; }
  NSA_HOST_DEVICE int32_t stage_keys() const { return stage_blocks * pieces; }
  NSA_HOST_DEVICE int32_t weights_of_stage() const { return stage_blocks + spill_blocks; }
  NSA_HOST_DEVICE int32_t padded_rows() const { return queries * padded_group; }
};

// A sequence of the batch, as a unit sees it.
struct DecodeSequence {
  int32_t batch;  // 0 when packed
  int32_t first;  // token of its first query
  int32_t queries;
  int32_t length;  // keys
  NSA_HOST_DEVICE int32_t position(int32_t query) const { return length - queries + query; }
};

// Compressed blocks that a query at `position` sees.
NSA_HOST_DEVICE inline int32_t blocks_before(const DecodeParams& p, int32_t position) {
  const int32_t past = position + 1 - p.block_size;
  return past < 0 ? 0 : static_cast<int32_t>(p.by_block_stride.divide(static_cast<uint32_t>(past))) + 1;
}

// A unit: sequence `index` of the batch and KV head `head`.
struct DecodeUnit {
  int32_t index;
  int32_t head;
};

NSA_HOST_DEVICE inline DecodeUnit decode_unit(const DecodeParams& p, int32_t unit) {
  const int32_t index = static_cast<int32_t>(p.by_heads_kv.divide(static_cast<uint32_t>(unit)));
  return {index, unit - index * p.heads_kv};
}

NSA_HOST_DEVICE inline DecodeSequence decode_sequence(const DecodeParams& p, int32_t index) {
  const int32_t length = p.cache_seqlens[index];
  const int32_t held = length < 0 ? 0 : length < p.max_tokens ? length : p.max_tokens;
  if (p.cumulative_q == nullptr) {
    return {index, 0, p.queries, held};
  }
  const int32_t first = p.cumulative_q[index];
  const int32_t queries = p.cumulative_q[index + 1] - first;
  return {0, first, queries < p.queries ? queries : p.queries, held};
}

}  // namespace nsa
