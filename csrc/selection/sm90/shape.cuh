// Shapes, shared memory and tiles of queries of Hopper's choice of blocks.
#pragma once

#include "common/sm90/block.cuh"
#include "selection/ranking.cuh"

namespace nsa {

struct SelectSm90Params {
  SelectBlocksParams select;
  TileSteps steps;
  Visibility seen;  // of compressed keys
  Divisor by_heads_kv;
  Divisor by_block_queries;  // all consumers'
  Divisor by_tiles;          // of queries of one sequence; dense only
  Divisor by_select_size;
  Divisor by_blocks;  // that a step ranks
  Divisor by_parts;
  int32_t initial;  // forced blocks
  int32_t local;
  int32_t slots;           // of tiles of queries
  int32_t tiles;           // slots times KV heads
  int32_t parts;           // slots that the heads of a query fill
  int32_t queries;         // of a consumer
  int32_t consumer_bytes;  // that its copies of Q write
  CUtensorMap q;  // boxes of 64 columns, G heads, and all queries of a consumer where no slot has room to spare
  CUtensorMap k;  // boxes of 64 columns, one head, kKeysPerTile compressed keys
};

// Scores in lists and queues are integers of the same order: see order_of.
template <int kLength_>
struct BlockList {
  static constexpr int kLength = kLength_;
  int32_t scores[kLength];
  int32_t blocks[kLength];
};

constexpr int kQueue = select_sm90::kQueue;

// What waits to be merged with a query's list.
struct CandidateQueue {
  int32_t scores[kQueue];
  int32_t blocks[kQueue];
};

// A consumer multiplies 64 keys with kColumns columns, slots of kSlot heads of one query. Lists hold up to kListed
// blocks.
template <typename Element_, int kDim_, int kSlot_, int kListed_, int kConsumers_, int kRankers_, int kStages_,
          int kStripTiles_>
struct SelectSm90Shape {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kSlot = kSlot_;
  static constexpr int kListed = kListed_;
  static constexpr int kConsumers = kConsumers_;                        // warpgroups
  static constexpr int kRankers = kRankers_;                            // warps for each consumer
  static constexpr int kHelpers = (2 + kConsumers * kRankers + 3) / 4;  // warpgroups that produce and rank
  static constexpr int kStages = kStages_;
  static constexpr int kStripTiles = kStripTiles_;  // steps whose strips may wait to be ranked
  static constexpr int kStripRing = (kStripTiles + 1) * kKeysPerTile;
  static constexpr int kStripPitch = select_sm90::strip_pitch(kStripRing);
  static_assert(kStripRing >= kRing && (kStripRing & (kStripRing - 1)) == 0);
  static constexpr int kColumns = select_sm90::kColumns;
  static constexpr int kSlots = kColumns / kSlot;
  static constexpr int kThreads = (kConsumers + kHelpers) * kWarpgroup;
  static constexpr int kHelperRegisters = kSlot == 16 ? 72 : 80;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 120 : kSlot == 16 ? 112 : 104;
  static_assert(kConsumers + kHelpers == 5 && kHelpers * kHelperRegisters + kConsumers * kConsumerRegisters <= 480);
  static constexpr int kPairs = kSlots / 2 / kRankers;  // of queries, of a warp that ranks
  static_assert(kSlots % (2 * kRankers) == 0);
  // Accumulator tiles of whose columns threads keep the shifts, as far as registers suffice; others are read each step.
  static constexpr int kKeptShifts = kSlot < 16 ? 0 : kDim <= 128 ? 14 : 8;

  using QTile = PanelTile<Element, kColumns, kDim>;
  using KTile = PanelTile<Element, kKeysPerTile, kDim>;

  struct Shared {
    alignas(1024) Element q[kConsumers][QTile::kSize];
    alignas(1024) Element k[kStages][KTile::kSize];
    alignas(16) float strips[kConsumers][kSlots][kStripPitch];
    alignas(16) float lse[kConsumers][kColumns];     // +inf: no head there
    alignas(16) float shifts[kConsumers][kColumns];  // -lse log2(e)
    int32_t first_positions[kConsumers];             // of each consumer's queries
    CandidateQueue queues[kConsumers][kSlots];
    BlockList<kListed> lists[kConsumers][kSlots];
    // Filled by the producer, drained by the warps of one consumer (q, lse) or of all (k).
    Barrier q_full[kConsumers], q_empty[kConsumers];
    Barrier k_full[kStages], k_empty[kStages];
    // Filled by the warps of one consumer, drained by those that rank.
    Barrier strips_full[kConsumers][kStripTiles], strips_empty[kConsumers][kStripTiles];
  };
};

// Named barriers, and the next ones: of each consumer's threads; each consumer's turn to start a product.
constexpr int kConsumerBarrier = 1;
constexpr int kTurnBarrier = 4;

// Queries of one sequence and one KV head that a block of threads chooses for at a time.
struct SelectSm90Tile {
  SequencePlace place;
  int32_t head_kv;
  int32_t first_query;
  int32_t end_query;
  int32_t steps;  // tiles of keys, enough for every selectable block, also those of keys that nobody sees yet
};

__device__ inline int32_t own_block_of(const SelectSm90Params& params, int32_t position) {
  return position < 0 ? -1 : static_cast<int32_t>(params.by_select_size.divide(static_cast<uint32_t>(position)));
}

// The latest queries see the most keys: they go first. Slots are those of common/sequences.cuh.
__device__ inline SelectSm90Tile select_tile(const SelectSm90Params& params, int32_t number) {
  const SequenceLayout& s = params.select.sequences;
  const auto queries = static_cast<int32_t>(params.by_block_queries.divisor);
  const auto from_last = static_cast<int32_t>(params.by_heads_kv.divide(number));
  const Tile tile =
      find_tile(s, s.cumulative_q, 1, params.by_tiles, params.by_block_queries, params.slots - 1 - from_last);
  SelectSm90Tile to;
  to.place = place_of(s, tile.sequence);
  to.head_kv = number - from_last * s.heads_kv;
  to.first_query = tile.index * queries;
  to.end_query = min(to.first_query + queries, to.place.q_length);
  const int32_t blocks = own_block_of(params, to.place.offset + to.end_query - 1) + 1;
  to.steps = static_cast<int32_t>(params.by_blocks.divide(blocks + params.steps.blocks - 1));
  return to;
}

// Calls with each tile of this block.
template <typename Function>
__device__ inline void for_each_select_tile(const SelectSm90Params& params, const Function& function) {
  const int32_t blocks = static_cast<int32_t>(gridDim.x);
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  for (int32_t round = 0; round * blocks < params.tiles; ++round) {
    const int32_t number = tile_of_round(round, block, blocks);
    if (number < params.tiles) {
      const SelectSm90Tile tile = select_tile(params, number);
      if (tile.first_query < tile.end_query) {
        function(tile);
      }
    }
  }
}

}  // namespace nsa
