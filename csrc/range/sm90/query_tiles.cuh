// Hopper's gradient of q over a range: shapes, shared memory, tiles of rows, what the producers copy, how rows leave.
#pragma once

#include "common/keys.cuh"
#include "common/rows.cuh"
#include "common/sm90/block.cuh"
#include "common/sm90/write_row.cuh"
#include "range/params.h"

namespace nsa {

struct RangeBackwardQuerySm90Params {
  RangeBackwardParams range;
  int32_t tiles;           // of rows, times KV heads
  int32_t slots;           // for tiles of one KV head: common/sequences.cuh
  Divisor by_heads;        // by KV heads
  Divisor by_slots;        // by the slots of a dense sequence
  Divisor by_rows;         // by the rows of a tile
  int32_t consumer_rows;   // of a warpgroup: the G heads of as many queries as 64 rows hold
  int32_t consumer_bytes;  // that its copies of Q and dO write
  CUtensorMap q;           // boxes of 64 columns, G heads, 64 / G tokens
  CUtensorMap grad_out;
  CUtensorMap k;  // boxes of 64 columns, one head, kKeys tokens
  CUtensorMap v;
};

template <typename Element_, int kDimK_, int kDimV_, int kConsumers_, int kKeys_, int kRowSlots_, int kKStages_,
          int kVStages_>
struct RangeBackwardQuerySm90Shape : ConsumersShape<Element_, kDimK_, kDimV_, kConsumers_, kKeys_> {
  static constexpr int kRowSlots = kRowSlots_;  // for the rows of a warpgroup
  static constexpr int kKStages = kKStages_;
  static constexpr int kVStages = kVStages_;

  using QTile = PanelTile<Element_, 64, kDimK_>;
  using GradOutTile = PanelTile<Element_, 64, kDimV_>;

  struct Shared {
    alignas(1024) Element_ q[kRowSlots][QTile::kSize];
    alignas(1024) Element_ grad_out[kRowSlots][GradOutTile::kSize];
    alignas(1024) Element_ k[kKStages][kKeys_ * kDimK_];
    alignas(1024) Element_ v[kVStages][kKeys_ * kDimV_];
    // Filled by the producers' copies, drained by the warps of one consumer (q, grad_out) or of all (k, v).
    Barrier rows_full[kRowSlots], rows_empty[kRowSlots];
    Barrier k_full[kKStages], k_empty[kKStages];
    Barrier v_full[kVStages], v_empty[kVStages];
  };
};

namespace grad_q {

// Tokens and keys of all sequences are below 2^31: maps count them in 32 bits, too.
struct RowTile {
  int32_t batch;
  int32_t head_kv;
  int32_t first_token;  // of the sequence, in packed q
  int32_t first_key;    // of the sequence, in packed k and v
  int32_t num_keys;     // of the sequence
  int32_t offset;       // query i stands at position offset + i
  int32_t first_row;
  int32_t last_row;  // before the first row where a slot holds no tile
  int32_t begin;     // keys that any row sees
  int32_t end;
};

// The latest queries see the most keys: they go first.
__device__ inline RowTile row_tile(const RangeBackwardQuerySm90Params& params, int32_t number) {
  const SequenceLayout& s = params.range.sequences;
  const Visibility& seen = params.range.visibility;
  const int32_t tile_rows = static_cast<int32_t>(params.by_rows.divisor);
  const auto from_last = static_cast<int32_t>(params.by_heads.divide(static_cast<uint32_t>(number)));
  RowTile to;
  to.head_kv = number - from_last * s.heads_kv;
  const Tile tile =
      find_tile(s, s.cumulative_q, s.group, params.by_slots, params.by_rows, params.slots - 1 - from_last);
  const SequencePlace place = place_of(s, tile.sequence);
  const KeysPlace keys = keys_of(place, seen, params.range.compressed);
  to.batch = static_cast<int32_t>(place.batch);
  to.first_token = static_cast<int32_t>(place.q_begin);
  to.first_key = static_cast<int32_t>(keys.begin);
  to.num_keys = keys.length;
  to.offset = place.offset;
  to.first_row = tile.index * tile_rows;
  to.last_row = min(to.first_row + tile_rows, place.q_length * s.group) - 1;
  to.begin = seen.begin(to.offset + row_at(s, 0, to.first_row).query);
  to.end = min(seen.end(to.offset + row_at(s, 0, to.last_row).query), to.num_keys);
  return to;
}

// The tiles of this block.
struct TileWalk {
  int32_t round = 0;

  // Whether there is one more.
  __device__ bool next(RowTile& tile, const RangeBackwardQuerySm90Params& params) {
    const int32_t blocks = static_cast<int32_t>(gridDim.x);
    const int32_t block = static_cast<int32_t>(blockIdx.x);
#pragma unroll 1
    for (; round * blocks < params.tiles; ++round) {
      const int32_t number = tile_of_round(round, block, blocks);
      if (number < params.tiles) {
        tile = row_tile(params, number);
        if (tile.first_row <= tile.last_row) {
          ++round;
          return true;
        }
      }
    }
    return false;
  }
};

// Copies K and V of all tiles, in the order in which consumers want them.
template <typename Shape>
__device__ inline void produce_keys(const RangeBackwardQuerySm90Params& params, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  prefetch_map(&params.k);
  prefetch_map(&params.v);
  RingPlace<Shape::kKStages> k_place;
  RingPlace<Shape::kVStages> v_place;
  RowTile tile{};
  for (TileWalk walk; walk.next(tile, params);) {
    const auto copy = [&]<typename Panels>(Panels, const CUtensorMap& map, Element* to, Barrier* full, Barrier* empty,
                                           uint32_t parity, int32_t key) {
      wait(empty, parity ^ 1);
      arrive_expecting(full, Panels::kSize * sizeof(Element));
      copy_panels<Panels>(to, map, full, tile.head_kv, tile.first_key + key, tile.batch, kEvictLast);
    };
    for (int32_t key = tile.begin; key < tile.end; key += Shape::kKeys) {
      copy(typename Shape::KTile(), params.k, shared.k[k_place.stage], &shared.k_full[k_place.stage],
           &shared.k_empty[k_place.stage], k_place.parity, key);
      k_place.advance();
      copy(typename Shape::VTile(), params.v, shared.v[v_place.stage], &shared.v_full[v_place.stage],
           &shared.v_empty[v_place.stage], v_place.parity, key);
      v_place.advance();
    }
  }
}

// Into the L2 cache: a box of a tensor; the line of an address.
__device__ inline void fetch_box(const CUtensorMap* map, int32_t column, int32_t head, int32_t token, int32_t batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];\n" ::"l"(map), "r"(column),
               "r"(head), "r"(token), "r"(batch)
               : "memory");
}
__device__ inline void fetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address) : "memory");
}

// Brings what consumers want of a tile's rows to the L2 cache. By a warp.
template <typename Shape>
__device__ inline void fetch_rows(const RangeBackwardQuerySm90Params& params, const RowTile& tile) {
  const RangeBackwardParams& range = params.range;
  const SequenceLayout& s = range.sequences;
  if (fresh_thread() % 32 < Shape::kConsumers) {
    const int32_t query = row_at(s, 0, tile.first_row + params.consumer_rows * (fresh_thread() % 32)).query;
    const auto fetch = [&]<typename Panel>(Panel, const CUtensorMap& map) {
#pragma unroll
      for (int panel = 0; panel < Panel::kPanels; ++panel) {
        fetch_box(&map, 64 * panel, tile.head_kv * s.group, tile.first_token + query, tile.batch);
      }
    };
    fetch(typename Shape::QTile(), params.q);
    fetch(typename Shape::GradOutTile(), params.grad_out);
  }
#pragma unroll 1
  for (int32_t row = tile.first_row + fresh_thread() % 32; row <= tile.last_row; row += 32) {
    const Row at = row_at(s, tile.head_kv, row);
    const int64_t token = int64_t{tile.first_token} + at.query;
    fetch_line(&range.lse.at(tile.batch, at.head, token));
    fetch_line(&range.delta.at(tile.batch, at.head, token));
    if (range.gate.data != nullptr) {
      fetch_line(&range.gate.at(tile.batch, at.head, token));
    }
  }
}

// Copies Q and dO of all tiles: slots go round, one for each consumer of each tile. By a warp.
template <typename Shape>
__device__ inline void produce_rows(const RangeBackwardQuerySm90Params& params, typename Shape::Shared& shared) {
  RingPlace<Shape::kRowSlots> slot;
  const SequenceLayout& s = params.range.sequences;
  TileWalk walk;
  RowTile tile{};
  bool more = walk.next(tile, params);
  while (more) {
    if (tile.begin < tile.end) {
#pragma unroll 1
      for (int i = 0; i < Shape::kConsumers; ++i) {
        wait(&shared.rows_empty[slot.stage], slot.parity ^ 1);
        if (fresh_thread() % 32 == 0) {
          const int32_t query = row_at(s, 0, tile.first_row + params.consumer_rows * i).query;
          Barrier* const full = &shared.rows_full[slot.stage];
          const int32_t head = tile.head_kv * s.group;
          const int32_t token = tile.first_token + query;
          arrive_expecting(full, params.consumer_bytes);
          copy_panels<typename Shape::QTile>(shared.q[slot.stage], params.q, full, head, token, tile.batch,
                                             kEvictFirst);
          copy_panels<typename Shape::GradOutTile>(shared.grad_out[slot.stage], params.grad_out, full, head, token,
                                                   tile.batch, kEvictFirst);
        }
        __syncwarp();
        slot.advance();
      }
    }
    more = walk.next(tile, params);
    if (more) {
      fetch_rows<Shape>(params, tile);  // a tile ahead
    }
  }
}

}  // namespace grad_q
}  // namespace nsa
