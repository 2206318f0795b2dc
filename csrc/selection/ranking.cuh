// From the probabilities of compressed blocks to a query's list. Every query has a record in shared memory:
//   strip   the head-summed probabilities of the last kRing compressed blocks, block m at m % kRing
//   list    the most important free blocks so far, in descending order, lower indices first among equals
// A warp ranks the blocks of each tile as the tile's probabilities come, so nothing longer than a strip is ever kept:
//   importance(j) = sum over m of p[m] count(m, j)                                                        (Eq. 9)
// Free blocks are the selectable ones that aren't forced. Blocks come in ascending order: whatever ties with a block
// that is in the list already goes behind it.
#pragma once

#include "common/rows.cuh"
#include "selection/params.h"
#include "selection/tiles.h"

namespace nsa {

constexpr unsigned kWholeWarp = 0xffffffffu;
static_assert(kRing >= kKeysPerTile + kMostPieces - 1 && kKeysPerTile >= kMostPieces);

struct QueryRecord {
  float strip[kRing];
  float scores[kMostSelected];
  int32_t blocks[kMostSelected];
  int32_t own_block;    // the last selectable one; -1: none
  int32_t free;         // places of the list that aren't forced
  int32_t padding[14];  // records lie 16 banks apart: two queries' strips are written without conflicts
};
static_assert(sizeof(QueryRecord) % 128 == 64 && sizeof(QueryRecord) == kQueryRecordBytes);

// A tile ends where a selection block does: it ranks `blocks` of them, and the next tile begins `keys` further.
struct TileSteps {
  int32_t pieces_per_compressed;
  int32_t pieces_per_selected;
  int32_t blocks;
  int32_t keys;

  NSA_HOST_DEVICE explicit TileSteps(const SelectBlocksParams& params)
      : pieces_per_compressed(params.block_size / params.block_stride),
        pieces_per_selected(params.select_size / params.block_stride),
        blocks(kKeysPerTile / pieces_per_selected),
        keys(blocks * pieces_per_selected) {}
};

__device__ inline int32_t own_block_of(int32_t position, int32_t select_size) {
  return position < 0 ? -1 : position / select_size;
}

// Of the forced blocks, those that are selectable: no more than there are blocks, where both kinds overlap.
__device__ inline int32_t count_forced(const ForcedBlocks& forced, int32_t own_block) {
  return static_cast<int32_t>(min_of(forced.initial + forced.local, int64_t{own_block} + 1));
}

// By one warp.
__device__ inline void start_record(QueryRecord& record, const SelectBlocksParams& params, int32_t position, int lane) {
  for (int i = lane; i < kRing; i += 32) {
    record.strip[i] = 0.f;
  }
  for (int i = lane; i < kMostSelected; i += 32) {
    record.scores[i] = kMinusInfinity;
    record.blocks[i] = -1;
  }
  if (lane == 0) {
    const int32_t own_block = own_block_of(position, params.select_size);
    record.own_block = own_block;
    record.free = params.num_selected - count_forced(params.forced, own_block);
  }
}

// `record`: the first of `strips` records whose strips, added up, are the query's probabilities.
__device__ inline float block_importance(const QueryRecord* record, int strips, const TileSteps& steps, int32_t block) {
  float importance = 0.f;
  for (int i = 0; i < strips; ++i) {
    const float* const strip = record[i].strip;
    const int32_t first = block * steps.pieces_per_selected;
    if (steps.pieces_per_compressed == 2 && steps.pieces_per_selected == 4) {  // weights 1, 2, 2, 2, 1
      const float before = strip[(first - 1) & (kRing - 1)];
      const float4 inside = *reinterpret_cast<const float4*>(strip + (first & (kRing - 1)));
      importance += (before + inside.w) + 2.f * (inside.x + inside.y + inside.z);
    } else {
      const BlockOverlap overlap{steps.pieces_per_compressed, steps.pieces_per_selected};
      const int32_t end = first + steps.pieces_per_selected;
      for (int32_t m = static_cast<int32_t>(overlap.first(block)); m < end; ++m) {
        importance += strip[m & (kRing - 1)] * static_cast<float>(overlap.count(m, block));
      }
    }
  }
  return importance == importance ? importance : -1.f;  // NaN counts as the lowest
}

// Puts candidates first_block + i, for each bit i of `mask`, into a record's list. Lane first_lane + i knows the score
// of candidate i. Lane i holds places i, 32 + i, ... of the list.
template <int kPlaces>
__device__ inline void insert_candidates(QueryRecord& record, unsigned mask, float score, int first_lane,
                                         int32_t first_block, int lane) {
  float scores[kPlaces];
  int32_t blocks[kPlaces];
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    scores[i] = record.scores[32 * i + lane];
    blocks[i] = record.blocks[32 * i + lane];
  }
  for (; mask != 0; mask &= mask - 1) {
    const int candidate = __ffs(static_cast<int>(mask)) - 1;
    const float new_score = __shfl_sync(kWholeWarp, score, first_lane + candidate);
    const int32_t new_block = first_block + candidate;
#pragma unroll
    for (int i = kPlaces - 1; i >= 0; --i) {
      float score_before = __shfl_up_sync(kWholeWarp, scores[i], 1);
      int32_t block_before = __shfl_up_sync(kWholeWarp, blocks[i], 1);
      if (i > 0) {
        const float last_score = __shfl_sync(kWholeWarp, scores[i > 0 ? i - 1 : 0], 31);
        const int32_t last_block = __shfl_sync(kWholeWarp, blocks[i > 0 ? i - 1 : 0], 31);
        score_before = lane == 0 ? last_score : score_before;
        block_before = lane == 0 ? last_block : block_before;
      }
      if (scores[i] < new_score) {  // moves one place down, unless its place is the new one's
        const bool here = (i == 0 && lane == 0) || score_before >= new_score;
        scores[i] = here ? new_score : score_before;
        blocks[i] = here ? new_block : block_before;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    record.scores[32 * i + lane] = scores[i];
    record.blocks[32 * i + lane] = blocks[i];
  }
  __syncwarp();
}

// Ranks the selection blocks of tile number `tile`, whose probabilities are in the strips, for kQueries queries at
// once, each in 32 / kQueries lanes. By one warp.
template <int kQueries>
__device__ inline void rank_tile(QueryRecord* records, int strips, const SelectBlocksParams& params,
                                 const TileSteps& steps, int32_t tile, int lane) {
  constexpr int kLanes = 32 / kQueries;
  const int first_lane = lane / kLanes * kLanes;
  const QueryRecord* const own = records + lane / kLanes;
  for (int32_t begin = 0; begin < steps.blocks; begin += kLanes) {
    const int32_t first_block = tile * steps.blocks + begin;
    const int32_t block = first_block + lane - first_lane;
    const int32_t free = own->free;
    float score = 0.f;
    bool candidate = begin + lane - first_lane < steps.blocks && block <= own->own_block && free > 0 &&
                     !params.forced.contains(block, own->own_block);
    if (candidate) {
      score = block_importance(own, strips, steps, block);
      candidate = score > own->scores[free - 1];
    }
    const unsigned candidates = __ballot_sync(kWholeWarp, candidate);
    if (candidates == 0) {
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < kQueries; ++i) {
      const unsigned mask = kQueries == 1 ? candidates : candidates >> (i * kLanes) & ((1u << kLanes % 32) - 1);
      if (mask == 0) {
        continue;
      }
      if (params.num_selected <= 32) {
        insert_candidates<1>(records[i], mask, score, i * kLanes, first_block, lane);
      } else {
        insert_candidates<kMostSelected / 32>(records[i], mask, score, i * kLanes, first_block, lane);
      }
    }
  }
}

// Place `at` of a list that holds `count` blocks, where what belongs there needed no choice: initial blocks come first,
// local ones last, and -1 after them.
__device__ inline void write_unchosen(int32_t* list, int32_t at, int32_t initial, int32_t local, int32_t count,
                                      int32_t own_block) {
  if (at < initial) {
    list[at] = at;
  } else if (at >= count) {
    list[at] = -1;
  } else if (at >= count - local) {
    list[at] = own_block - (count - 1 - at);
  }
}

// Forced and chosen blocks in ascending order, then -1. All initial blocks come before any free one, and all local
// blocks after it. By one warp.
__device__ inline void write_list(const QueryRecord& record, const SelectBlocksParams& params, int32_t* list,
                                  int lane) {
  const int32_t own_block = record.own_block;
  const int32_t initial = static_cast<int32_t>(min_of(params.forced.initial, int64_t{own_block} + 1));
  const int32_t local = static_cast<int32_t>(min_of(params.forced.local, int64_t{own_block} + 1));
  int32_t chosen = 0;
  for (int i = lane; i < kMostSelected; i += 32) {
    chosen += __popc(__ballot_sync(kWholeWarp, i < record.free && record.scores[i] > kMinusInfinity));
  }
  for (int i = lane; i < chosen; i += 32) {
    const int32_t block = record.blocks[i];
    int32_t place = initial;
    for (int j = 0; j < chosen; ++j) {
      place += record.blocks[j] < block;
    }
    list[place] = block;
  }
  const int32_t count = count_forced(params.forced, own_block) + chosen;
  for (int i = lane; i < params.num_selected; i += 32) {
    write_unchosen(list, i, initial, local, count, own_block);
  }
}

// Queries of one sequence and one KV head that a block of threads chooses for.
struct SelectTile {
  int32_t sequence;
  int32_t head_kv;
  int32_t first_query;  // within the sequence, and possibly past its end
};

// The latest queries see the most keys: they go first.
__device__ inline SelectTile find_select_tile(const SelectBlocksParams& params, int32_t queries) {
  const SequenceLayout& s = params.sequences;
  const unsigned heads = static_cast<unsigned>(s.heads_kv);
  const int64_t slot = gridDim.x / heads - 1 - blockIdx.x / heads;
  const Tile tile = find_tile(s, s.cumulative_q, 1, s.length_q, queries, slot);
  return {tile.sequence, static_cast<int32_t>(blockIdx.x % heads), tile.index * queries};
}

__device__ inline int32_t* list_of(const SelectBlocksParams& params, const SequencePlace& place, int32_t query,
                                   int32_t head_kv) {
  const SequenceLayout& s = params.sequences;
  const int64_t token = place.batch * s.length_q + place.q_begin + query;
  return params.block_indices + (token * s.heads_kv + head_kv) * params.num_selected;
}

__device__ inline int32_t visible_keys(const SelectBlocksParams& params, int32_t position) {
  return static_cast<int32_t>(num_compressed_blocks(int64_t{position} + 1, params.block_size, params.block_stride));
}

}  // namespace nsa
