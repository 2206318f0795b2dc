// Shapes, shared memory and tiles of rows of Hopper's attention over a range.
#pragma once

#include "attention/keys.cuh"
#include "attention/params.h"
#include "common/hopper.cuh"
#include "common/rows.cuh"
#include "common/softmax.cuh"

namespace nsa {

struct RangeForwardSm90Params {
  RangeForwardParams range;
  int32_t tiles;           // of rows, times KV heads
  int32_t consumer_rows;   // of a warpgroup: the G heads of as many queries as 64 rows hold
  int32_t consumer_bytes;  // that its copies of Q write
  CUtensorMap q;           // boxes of 64 columns, G heads, 64 / G tokens
  CUtensorMap k;           // boxes of 64 columns, one head, kKeys tokens
  CUtensorMap v;
};

template <typename Element_, int kDimK_, int kDimV_, int kConsumers_, int kKeys_, int kStages_>
struct RangeForwardSm90Shape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups; one more produces
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

  using QTile = PanelTile<Element, 64, kDimK>;
  using KTile = PanelTile<Element, kKeys, kDimK>;
  using VTile = PanelTile<Element, kKeys, kDimV>;

  struct Shared {
    alignas(1024) Element q[kConsumers][QTile::kSize];
    alignas(1024) Element k[kStages][KTile::kSize];
    alignas(1024) Element v[kStages][VTile::kSize];
    // Filled by the producer's copies, drained by the warps of one consumer (q) or of all (k, v).
    Barrier q_full[kConsumers], q_empty[kConsumers];
    Barrier k_full[kStages], k_empty[kStages];
    Barrier v_full[kStages], v_empty[kStages];
  };
  static_assert(sizeof(Shared) <= 232448);
};

// Named barriers: a consumer's turn to start products, and the threads of a consumer.
constexpr int kTurnBarrier = 1;
constexpr int kConsumerBarrier = 5;

struct RangeTile {
  SequencePlace place;
  KeysPlace keys;
  int32_t head_kv;
  int32_t first_row;
  int32_t last_row;  // before the first row where a slot holds no tile
  int32_t begin;     // keys that any row sees
  int32_t end;
};

// The latest queries see the most keys: they go first.
__device__ inline RangeTile range_tile(const RangeForwardSm90Params& params, int32_t tile_rows, int32_t number) {
  const Sequences& s = params.range.sequences;
  const Visibility& seen = params.range.visibility;
  const int32_t slots = params.tiles / s.heads_kv;
  RangeTile to;
  to.head_kv = number % s.heads_kv;
  const Tile tile =
      find_tile(s, s.cumulative_q, s.group, s.length_q * s.group, tile_rows, slots - 1 - number / s.heads_kv);
  to.place = place_of(s, tile.sequence);
  to.keys = keys_of(to.place, seen, params.range.compressed);
  to.first_row = tile.index * tile_rows;
  to.last_row = min(to.first_row + tile_rows, to.place.q_length * s.group) - 1;
  to.begin = seen.begin(to.place.offset + row_at(s, 0, to.first_row).query);
  to.end = min(seen.end(to.place.offset + row_at(s, 0, to.last_row).query), to.keys.length);
  return to;
}

// Calls with each tile of this block. Every other round runs backwards, so that no block gets the longest of each.
template <typename Function>
__device__ inline void for_each_range_tile(const RangeForwardSm90Params& params, int32_t tile_rows,
                                           const Function& function) {
  const int32_t blocks = static_cast<int32_t>(gridDim.x);
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  for (int32_t round = 0; round * blocks < params.tiles; ++round) {
    const int32_t number = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    if (number < params.tiles) {
      const RangeTile tile = range_tile(params, tile_rows, number);
      if (tile.first_row <= tile.last_row) {
        function(tile);
      }
    }
  }
}

}  // namespace nsa
