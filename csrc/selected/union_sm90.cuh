// Tiles of 16 tokens and the union of their lists of blocks, for Hopper's selected attention.
#pragma once

#include "common/copy_sm90.cuh"
#include "common/rows.cuh"
#include "selected/params.h"

namespace nsa {

template <typename Element_, int kDimK_, int kDimV_, int kStages_>
struct SelectedForwardSm90Shape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kStages = kStages_;
  static constexpr int kKeys = 64;
  static constexpr int kPartKeys = 32;  // that a warp takes at once: more need more registers than there are
  static constexpr int kTokens = 16;
  static constexpr int kWarpTokens = 2;
  static constexpr int kHeads = 16;
  static constexpr int kWarps = kTokens / kWarpTokens;  // consumers
  static constexpr int kThreads = 32 * kWarps + 128;
  using QTile = SharedTile<Element, kHeads, kDimK>;
  using KTile = PanelTile<Element, kKeys, kDimK>;
  using VTile = PanelTile<Element, kKeys, kDimV>;
  static constexpr int kStageBytes = (KTile::kSize + VTile::kSize) * sizeof(Element);
  static constexpr int kQBytes = kTokens * QTile::kSize * sizeof(Element);
  static_assert(kDimV <= kDimK);  // the output lies where Q was
};

// A step in one word. Blocks are numbers below 2^16.
__device__ inline uint32_t pack_step(int32_t block, uint32_t tokens) {
  return (static_cast<uint32_t>(block) << 16) | tokens;
}
constexpr int32_t kMostUnionBlocks = 1 << 16;

template <int kStages>
struct UnionBarriers {
  Barrier full[kStages];   // filled by the copies of a step, watched by the warps that need it
  Barrier empty[kStages];  // drained by those warps; the producer arrives for the others
  Barrier list_full[2];    // written by the merging warp
  Barrier list_empty[2];   // read by the consumers and the producer
  uint32_t issued;         // steps whose copies are under way or done: before that, `full` may be two phases behind
  int32_t steps[2];        // of each list
};

template <typename Shape>
constexpr int64_t selected_forward_sm90_shared_bytes(int32_t num_selected) {
  return Shape::kStages * Shape::kStageBytes + Shape::kQBytes + int64_t{2} * Shape::kTokens * num_selected * 4 +
         sizeof(UnionBarriers<Shape::kStages>);
}

struct SelectedForwardSm90Params {
  SelectedForwardParams selected;
  int64_t tiles;  // slots of 16 tokens, times Hkv, times tiles of 16 heads
  CUtensorMap k;  // boxes of 64 columns, 64 tokens
  CUtensorMap v;
};

// 16 tokens of one sequence and up to 16 heads of one KV head.
struct UnionTile {
  SequencePlace place;
  int32_t first_query;
  int32_t head_kv;
  int32_t first_head;  // among all query heads
  int32_t heads;

  // Keys before this are seen by the tile's token: none where there is no such token.
  __device__ int32_t limit(int token) const {
    const int32_t query = first_query + token;
    return query < place.q_length ? min(place.offset + query + 1, place.k_length) : 0;
  }
};

__device__ inline UnionTile union_tile(const SelectedForwardParams& p, int64_t index, int64_t tiles) {
  const Sequences& s = p.sequences;
  const int32_t head_tiles = (s.group + 15) / 16;
  const int64_t slots = tiles / (int64_t{s.heads_kv} * head_tiles);
  const int64_t slot = index % (slots * head_tiles) / head_tiles;
  const int32_t head_tile = static_cast<int32_t>(index % head_tiles);
  const Tile tile = find_tile(s, s.cumulative_q, 1, s.length_q, 16, slot);
  UnionTile result;
  result.place = place_of(s, tile.sequence);
  result.first_query = tile.index * 16;
  result.head_kv = static_cast<int32_t>(index / (slots * head_tiles));
  result.first_head = result.head_kv * s.group + head_tile * 16;
  result.heads = min(16, s.group - head_tile * 16);
  return result;
}

// Joins the lists of a tile's tokens, lane i holding token i's, by taking the lowest of all heads over and over. What
// begins past what a token sees is left out. Returns how many steps it wrote.
__device__ inline int32_t merge_lists(uint32_t* to, const SelectedForwardParams& p, const UnionTile& tile, int lane) {
  constexpr int32_t kNone = 0x7fffffff;
  const int32_t limit = lane < 16 ? tile.limit(lane) : 0;
  const int64_t token = tile.place.batch * p.sequences.length_q + tile.place.q_begin + tile.first_query + lane;
  const int32_t* next = p.block_indices + (token * p.sequences.heads_kv + tile.head_kv) * p.num_selected;
  const int32_t* const end = limit > 0 ? next + p.num_selected : next;
  const auto take = [&] {
    while (next != end) {
      const int32_t block = *next++;
      if (block >= 0 && int64_t{block} * p.select_size < limit) {
        return block;
      }
    }
    return kNone;
  };
  int32_t head = take();
  int32_t steps = 0;
  while (true) {
    const int32_t block = __reduce_min_sync(0xffffffffu, head);
    if (block == kNone) {
      return steps;
    }
    const uint32_t tokens = __ballot_sync(0xffffffffu, head == block);
    if (lane == 0) {
      to[steps] = pack_step(block, tokens);
    }
    ++steps;
    if (head == block) {
      head = take();
    }
  }
}

}  // namespace nsa
