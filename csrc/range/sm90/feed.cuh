// What feeds the consumers of Hopper's attention over a range: a warp that lists tiles, and a thread that copies.
#pragma once

#include "range/sm90/forward_tiles.cuh"

namespace nsa {

// By a warp: tells the others of the block's tiles, one after the other.
template <typename Shape>
__device__ inline void list_range_tiles(const RangeForwardSm90Params& params, typename Shape::Shared& shared) {
  constexpr int kTiles = Shape::kTiles;
  uint32_t listed = 0;
  const auto is_first = [] { return fresh_thread() % 32 == 0; };
  for_each_range_tile(params, [&](int32_t number) {
    RangeTile& tile = shared.tiles[RingPlace<kTiles>::of(listed).stage];
    if (is_first()) {
      wait(&shared.tile_empty[RingPlace<kTiles>::of(listed).stage], RingPlace<kTiles>::of(listed).parity ^ 1);
      set_range_tile(tile, params, number);
    }
    __syncwarp();
    const bool empty = tile.first_row > tile.last_row;
    __syncwarp();  // the next tile is written to the same place
    if (empty) {
      return;
    }
    if (is_first()) {
      arrive(&shared.tile_full[RingPlace<kTiles>::of(listed).stage]);
    }
    ++listed;
    __syncwarp();
  });
  if (is_first()) {
    wait(&shared.tile_empty[RingPlace<kTiles>::of(listed).stage], RingPlace<kTiles>::of(listed).parity ^ 1);
    shared.tiles[RingPlace<kTiles>::of(listed).stage] = kNoTile;
    arrive(&shared.tile_full[RingPlace<kTiles>::of(listed).stage]);
  }
}

// By one thread.
template <typename Shape>
__device__ inline void produce_range(const RangeForwardSm90Params& params, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using OutTile = typename Shape::OutTile;
  constexpr int kStages = Shape::kStages;
  constexpr int kQStages = Shape::kQStages;
  constexpr int kTiles = Shape::kTiles;
  const bool sums = Shape::kSums && params.range.sum.out != nullptr;
  uint32_t tiles = 0;
  uint32_t copied_q = 0;
  uint32_t copied_k = 0;
  uint32_t copied_v = 0;
  const auto copy_keys = [&]<typename Panel>(Panel, const RangeTile& tile, const CUtensorMap& map, Element* to,
                                             Barrier* full, Barrier* empty, uint32_t parity, int32_t key) {
    wait(empty, parity ^ 1);
    arrive_expecting(full, Panel::kSize * sizeof(Element));
#pragma unroll
    for (int panel = 0; panel < Panel::kPanels; ++panel) {
      copy_box(to + panel * Panel::kPanelSize, &map, full, 64 * panel, tile.head_kv, tile.first_key + key, tile.batch,
               kEvictLast);
    }
  };
  const auto copy_k = [&](const RangeTile& tile, int32_t key) {
    const int stage = RingPlace<kStages>::of(copied_k).stage;
    copy_keys(typename Shape::KTile(), tile, params.k, shared.k[stage], &shared.k_full[stage], &shared.k_empty[stage],
              RingPlace<kStages>::of(copied_k).parity, key);
    ++copied_k;
  };
  const auto copy_v = [&](const RangeTile& tile, int32_t key) {
    const int stage = RingPlace<kStages>::of(copied_v).stage;
    copy_keys(typename Shape::VTile(), tile, params.v, shared.v[stage], &shared.v_full[stage], &shared.v_empty[stage],
              RingPlace<kStages>::of(copied_v).parity, key);
    ++copied_v;
  };
  const auto copy_q = [&](const RangeTile& tile) {
    const SequenceLayout& s = params.range.sequences;
    const int stage = RingPlace<kQStages>::of(copied_q).stage;
    if (!sums) {  // else copy_others has waited for the output of the tile whose place this is
      wait(&shared.q_empty[stage], RingPlace<kQStages>::of(copied_q).parity ^ 1);
    }
    arrive_expecting(&shared.q_full[stage], Shape::kConsumers * params.consumer_bytes);
#pragma unroll 1
    for (int i = 0; i < Shape::kConsumers; ++i) {
      const int32_t token = tile.first_token + row_at(s, 0, tile.first_row + params.consumer_rows * i).query;
#pragma unroll
      for (int panel = 0; panel < QTile::kPanels; ++panel) {
        copy_box(shared.q[stage][i] + panel * QTile::kPanelSize, &params.q, &shared.q_full[stage], 64 * panel,
                 tile.head_kv * s.group, token, tile.batch, kEvictFirst);
      }
    }
    ++copied_q;
  };

  const auto copy_rows = [&](const RangeTile& tile, const CUtensorMap& map, Element* to, int consumer_size) {
    const SequenceLayout& s = params.range.sequences;
#pragma unroll 1
    for (int i = 0; i < Shape::kConsumers; ++i) {
      const int32_t token = tile.first_token + row_at(s, 0, tile.first_row + params.consumer_rows * i).query;
#pragma unroll
      for (int panel = 0; panel < OutTile::kPanels; ++panel) {
        copy_box(to + i * consumer_size + panel * OutTile::kPanelSize, &map, &shared.others_full, 64 * panel,
                 tile.head_kv * s.group, token, tile.batch, kEvictFirst);
      }
    }
  };
  // Of the tile whose Q was copied last: to where the output of the tile before was, and to where its own Q was.
  const auto copy_others = [&](const RangeTile& tile) {
    const uint32_t number = copied_q - 1;
    const int stage = RingPlace<kQStages>::of(number).stage;
    wait(&shared.out_empty, RingPlace<1>::of(number).parity ^ 1);
    arrive_expecting(&shared.others_full,
                     2 * Shape::kConsumers * params.consumer_rows * OutTile::kColumns * sizeof(Element));
    copy_rows(tile, params.others[0], shared.out[0], OutTile::kSize);
    wait(&shared.q_empty[stage], RingPlace<kQStages>::of(number).parity);
    copy_rows(tile, params.others[1], shared.q[stage][0], QTile::kSize);
  };

#pragma unroll 1
  while (true) {
    wait(&shared.tile_full[RingPlace<kTiles>::of(tiles).stage], RingPlace<kTiles>::of(tiles).parity);
    const RangeTile& tile = shared.tiles[RingPlace<kTiles>::of(tiles).stage];
    if (tile.first_row > tile.last_row) {
      return;
    }
    if (tile.begin < tile.end) {
      copy_k(tile, tile.begin);
      copy_q(tile);
#pragma unroll 1
      for (int32_t key = tile.begin; key < tile.end; key += Shape::kKeys) {
        if (key + Shape::kKeys < tile.end) {
          copy_k(tile, key + Shape::kKeys);
        }
        copy_v(tile, key);
      }
      if (sums) {
        copy_others(tile);
      }
    }
    arrive(&shared.tile_empty[RingPlace<kTiles>::of(tiles).stage]);
    ++tiles;
  }
}

}  // namespace nsa
