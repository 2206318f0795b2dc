// Shapes, shared memory and tiles of rows of Hopper's attention over a range.
#pragma once

#include "common/keys.cuh"
#include "common/rows.cuh"
#include "common/sm90/block.cuh"
#include "common/softmax.cuh"
#include "range/params.h"

namespace nsa {

struct RangeForwardSm90Params {
  RangeForwardParams range;
  float scale_log2;  // that powers of 2 are taken with
  int32_t tile_rows;
  int32_t tiles;        // in all
  int32_t slots;        // of tiles of one KV head, some of them empty: common/sequences.cuh
  int32_t dense_tiles;  // of a sequence, where they are dense
  Divisor by_tile_rows;
  Divisor by_dense_tiles;
  Divisor by_heads_kv;
  int32_t consumer_rows;   // of a warpgroup: the G heads of as many queries as 64 rows hold
  int32_t consumer_bytes;  // that its copies of Q write
  CUtensorMap q;           // boxes of 64 columns, G heads, 64 / G tokens
  CUtensorMap k;           // boxes of 64 columns, one head, kKeys tokens
  CUtensorMap v;
  CUtensorMap out;        // boxes as of q; of nothing where there is no out
  CUtensorMap others[2];  // the same, where there is a sum
  CUtensorMap sum;
};

// Kept in shared memory, read where it is needed: registers are full.
struct RangeTile {
  int32_t begin;  // keys that any row sees
  int32_t end;
  int32_t all_begin;  // keys that every row sees
  int32_t all_end;
  int32_t length;  // keys in use
  int32_t offset;  // from a query's number to its position
  int32_t first_row;
  int32_t last_row;  // before the first row where a slot holds no tile
  int32_t head_kv;
  int32_t batch;
  int32_t first_token;  // of the sequence, in q and out; packed tensors have fewer than 2^31 tokens
  int32_t first_key;    // of the sequence, in k and v
};
// What comes after a block's last one.
constexpr RangeTile kNoTile = {.begin = 0, .end = 0, .first_row = 0, .last_row = -1};

template <typename Element_, int kDimK_, int kDimV_, int kConsumers_, int kKeys_, int kStages_, int kQStages_>
struct RangeForwardSm90Shape : ConsumersShape<Element_, kDimK_, kDimV_, kConsumers_, kKeys_> {
  static constexpr int kStages = kStages_;
  static constexpr int kQStages = kQStages_;
  static constexpr int kTiles = 4;
  static constexpr bool kSums = kQStages == 2;  // whether there is room to take a gated sum

  // A tile's place in the list, and those of its Q, and of a step's K or V.
  using TilePlace = RingPlace<kTiles>;
  using QPlace = RingPlace<kQStages>;
  using KeysPlace = RingPlace<kStages>;

  using QTile = PanelTile<Element_, 64, kDimK_>;
  using OutTile = PanelTile<Element_, 64, kDimV_>;

  struct Shared {
    // With a sum, a stage of Q then takes the selected branch's rows, and `out` those of the compressed one.
    alignas(1024) Element_ q[kQStages][kConsumers_][QTile::kSize];
    alignas(1024) Element_ k[kStages][kKeys_ * kDimK_];
    alignas(1024) Element_ v[kStages][kKeys_ * kDimV_];
    alignas(1024) Element_ out[kConsumers_][OutTile::kSize];
    // Filled by the listing warp, drained by all others: by consumers when their output has left.
    RangeTile tiles[kTiles];
    Barrier tile_full[kTiles], tile_empty[kTiles];
    // Filled by the producer's copies, drained by the warps of all consumers.
    Barrier q_full[kQStages], q_empty[kQStages];
    Barrier k_full[kStages], k_empty[kStages];
    Barrier v_full[kStages], v_empty[kStages];
    // Filled by copies of the other branches' rows, which turn into output, and by the storing warp's gates.
    float gates[kSums ? kConsumers_ * 64 : 1][3];
    Barrier others_full;
    // Filled by all consumers, drained by the storing warp.
    Barrier out_full, out_empty;
  };
};

// Named barriers: a consumer's turn to start products, and the threads of a consumer.
constexpr int kTurnBarrier = 1;
constexpr int kConsumerBarrier = 5;

// The latest queries see the most keys: they go first.
__device__ inline void set_range_tile(RangeTile& to, const RangeForwardSm90Params& params, int32_t number) {
  const SequenceLayout& s = params.range.sequences;
  const Visibility& seen = params.range.visibility;
  const auto slot = static_cast<int32_t>(params.by_heads_kv.divide(static_cast<uint32_t>(number)));
  const Tile tile =
      find_tile(s, s.cumulative_q, s.group, params.by_dense_tiles, params.by_tile_rows, params.slots - 1 - slot);
  const SequencePlace place = place_of(s, tile.sequence);
  const KeysPlace keys = keys_of(place, seen, params.range.compressed);
  to.length = keys.length;
  to.offset = place.offset;
  to.first_row = tile.index * params.tile_rows;
  to.last_row = min(to.first_row + params.tile_rows, place.q_length * s.group) - 1;
  to.head_kv = number - slot * s.heads_kv;
  to.batch = static_cast<int32_t>(place.batch);
  to.first_token = static_cast<int32_t>(place.q_begin);
  to.first_key = static_cast<int32_t>(keys.begin);
  const int32_t first = place.offset + row_at(s, 0, to.first_row).query;
  const int32_t last = place.offset + row_at(s, 0, to.last_row).query;
  to.begin = seen.begin(first);
  to.end = min(seen.end(last), keys.length);
  to.all_begin = seen.begin(last);
  to.all_end = min(seen.end(first), keys.length);
}

// Calls with the number of each tile of this block.
template <typename Function>
__device__ inline void for_each_range_tile(const RangeForwardSm90Params& params, const Function& function) {
  const auto blocks = static_cast<int32_t>(gridDim.x);
#pragma unroll 1
  for (int32_t round = 0; round * blocks < params.tiles; ++round) {
    const int32_t number = tile_of_round(round, fresh_block(), blocks);
    if (number < params.tiles) {
      function(number);
    }
  }
}

}  // namespace nsa
