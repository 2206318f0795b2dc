// Shapes, shared memory and tiles of rows of Hopper's gradient of q over a range.
#pragma once

#include "attention/keys.cuh"
#include "attention/params.h"
#include "common/hopper.cuh"
#include "common/rows.cuh"

namespace nsa {

struct RangeBackwardQuerySm90Params {
  RangeBackwardParams range;
  int32_t tiles;           // of rows, times KV heads
  int32_t consumer_rows;   // of a warpgroup: the G heads of as many queries as 64 rows hold
  int32_t consumer_bytes;  // that its copies of Q and dO write
  CUtensorMap q;           // boxes of 64 columns, G heads, 64 / G tokens
  CUtensorMap grad_out;
  CUtensorMap grad_q;
  CUtensorMap k;  // boxes of 64 columns, one head, kKeys tokens
  CUtensorMap v;
};

template <typename Element_, int kDimK_, int kDimV_, int kConsumers_, int kKeys_, int kRowSlots_, int kKStages_,
          int kVStages_, bool kTurns_, int kPrefetch_ = 3>
struct RangeBackwardQuerySm90Shape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups; one more produces
  static constexpr int kKeys = kKeys_;
  static constexpr int kRowSlots = kRowSlots_;  // for the rows of a warpgroup
  static constexpr int kKStages = kKStages_;
  static constexpr int kVStages = kVStages_;
  static constexpr bool kTurns = kTurns_;
  static constexpr int kPrefetch = kPrefetch_;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

  using QTile = PanelTile<Element, 64, kDimK>;
  using GradOutTile = PanelTile<Element, 64, kDimV>;
  using KTile = PanelTile<Element, kKeys, kDimK>;
  using VTile = PanelTile<Element, kKeys, kDimV>;

  struct Shared {
    alignas(1024) Element q[kRowSlots][QTile::kSize];
    alignas(1024) Element grad_out[kRowSlots][GradOutTile::kSize];
    alignas(1024) Element k[kKStages][KTile::kSize];
    alignas(1024) Element v[kVStages][VTile::kSize];
    // Filled by the producers' copies, drained by the warps of one consumer (q, grad_out) or of all (k, v).
    Barrier rows_full[kRowSlots], rows_empty[kRowSlots];
    Barrier k_full[kKStages], k_empty[kKStages];
    Barrier v_full[kVStages], v_empty[kVStages];
  };
  static_assert(sizeof(Shared) <= 232448);
};

namespace grad_q {

// Where a ring of buffers stands. The parity is that of the fill to come.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct RowTile {
  SequencePlace place;
  KeysPlace keys;
  int32_t head_kv;
  int32_t first_row;
  int32_t last_row;  // before the first row where a slot holds no tile
  int32_t begin;     // keys that any row sees
  int32_t end;
};

// The latest queries see the most keys: they go first.
__device__ inline RowTile row_tile(const RangeBackwardQuerySm90Params& params, int32_t tile_rows, int32_t number) {
  const Sequences& s = params.range.sequences;
  const Visibility& seen = params.range.visibility;
  const int32_t slots = params.tiles / s.heads_kv;
  RowTile to;
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
__device__ inline void for_each_row_tile(const RangeBackwardQuerySm90Params& params, int32_t tile_rows,
                                         const Function& function) {
  const int32_t blocks = static_cast<int32_t>(gridDim.x);
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  for (int32_t round = 0; round * blocks < params.tiles; ++round) {
    const int32_t number = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    if (number < params.tiles) {
      const RowTile tile = row_tile(params, tile_rows, number);
      if (tile.first_row <= tile.last_row) {
        function(tile);
      }
    }
  }
}

}  // namespace grad_q
}  // namespace nsa
