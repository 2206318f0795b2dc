// Keys as they stream from pages into a ring of stages of 128 keys: some warps fill it, others multiply (consumer.cuh).
#pragma once

#include "common/rows.cuh"
#include "common/sm80/tile.cuh"
#include "common/sm90/copy.cuh"
#include "common/tile_dims.h"
#include "decode/ranges.cuh"
#include "decode/tiles.h"

namespace nsa {

// kStages_: of the ring. kRowTiles_: tiles of 16 rows.
template <typename Element_, int kDimK_, int kDimV_, int kRowTiles_, int kStages_>
struct StageShape : TileDimsOf<Element_, kDimK_, kDimV_> {
  using Element = Element_;
  using TileDimsOf<Element_, kDimK_, kDimV_>::kDimK;
  using TileDimsOf<Element_, kDimK_, kDimV_>::kDimV;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kStages = kStages_;
  static constexpr int kKeys = decode_sm90::kStageKeys;
  static constexpr int kProducers = 32 * decode_sm90::kProducerWarps;
  static constexpr int kWarps = decode_sm90::kConsumerWarps;
  static constexpr int kConsumers = 32 * kWarps;
  static constexpr int kThreads = decode_sm90::kThreads;
  static constexpr int kColumns = kDimV / kWarps;  // of a consuming warp
  using QTile = SharedTile<Element, kRows, kDimK>;
  using KTile = SharedTile<Element, kKeys, kDimK>;
  using VTile = SharedTile<Element, kKeys, kDimV>;
  using WeightTile = SharedTile<Element, kRows, kKeys>;
  static_assert(kKeys == 16 * kWarps && kKeys == 32 * decode_sm90::kProducerWarps && kColumns % 8 == 0);
};

template <typename Shape>
struct Ring {
  using Element = typename Shape::Element;
  Element k[Shape::kStages][Shape::KTile::kSize];
  Element v[Shape::kStages][Shape::VTile::kSize];
};

// A stage's keys and values are filled and drained each for themselves: keys are free as soon as they are scored.
template <typename Shape>
struct RingBarriers {
  Barrier k_full[Shape::kStages];
  Barrier k_empty[Shape::kStages];
  Barrier v_full[Shape::kStages];
  Barrier v_empty[Shape::kStages];

  __device__ void init() {
    init_ring(k_full, k_empty, Shape::kProducers, Shape::kWarps);
    init_ring(v_full, v_empty, Shape::kProducers, Shape::kWarps);
  }
};

constexpr int kConsumerBarrier = 1;
constexpr int kProducerBarrier = 2;
constexpr int kListBarrier = 3;

__device__ inline void sync_group(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
// What others wait for in sync_group.
__device__ inline void arrive_at_group(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
template <typename Shape>
__device__ inline void sync_consumers() {
  sync_group(kConsumerBarrier, Shape::kConsumers);
}
template <typename Shape>
__device__ inline void sync_producers() {
  sync_group(kProducerBarrier, Shape::kProducers);
}

// Keys and values of one head in their pools.
template <typename Element>
struct HeadPools {
  const Element* k;
  const Element* v;
  int32_t k_width;
  int32_t v_width;

  __device__ HeadPools(const PagedRows& keys, int32_t head)
      : k(static_cast<const Element*>(keys.k.data) + head * keys.k.head_stride),
        v(static_cast<const Element*>(keys.v.data) + head * keys.v.head_stride),
        k_width(keys.k.width),
        v_width(keys.v.width) {}
};

// Starts to copy 32 rows, from `first` on: each lane has its row's place in the pool, below 0 for a row of zeros.
template <typename Tile>
__device__ inline void copy_warp_rows(const Tile& tile, int first, const typename Tile::Element* pool, int32_t width,
                                      int64_t place) {
#pragma unroll 4
  for (int j = 0; j < Tile::kChunks; ++j) {
    const int i = 32 * j + this_lane();
    const int row = i / Tile::kChunks;
    const int index = i - row * Tile::kChunks;
    const int64_t from = __shfl_sync(0xffffffffu, place, row);
    const bool valid = from >= 0 && index * kChunk < width;
    copy_async(tile.chunk(first + row, index), pool + (valid ? from + index * kChunk : 0), valid);
  }
}

// By a producing warp: its 32 rows of a stage, once it is empty.
template <typename Shape>
__device__ inline void fill_stage(Ring<Shape>& ring, RingBarriers<Shape>& barriers, const RingPlace<Shape::kStages>& at,
                                  const HeadPools<typename Shape::Element>& pools, const RowOffsets& place) {
  const int first = 32 * this_warp();
  wait(&barriers.k_empty[at.stage], at.parity ^ 1);
  copy_warp_rows(typename Shape::KTile{ring.k[at.stage]}, first, pools.k, pools.k_width, place.k);
  arrive_after_copies(&barriers.k_full[at.stage]);
  wait(&barriers.v_empty[at.stage], at.parity ^ 1);
  copy_warp_rows(typename Shape::VTile{ring.v[at.stage]}, first, pools.v, pools.v_width, place.v);
  arrive_after_copies(&barriers.v_full[at.stage]);
}

// By all producers: queries of rows [first_row, ...), those from `rows` on as zeros.
template <typename Shape>
__device__ inline void fill_queries(typename Shape::Element* to, const DecodeParams& params,
                                    const DecodeSequence& sequence, int32_t head_kv, int32_t first_row, int32_t rows) {
  using Element = typename Shape::Element;
  const typename Shape::QTile tile{to};
  tile.copy_rows(params.q.width, params.q.data, static_cast<int>(threadIdx.x), Shape::kProducers,
                 [&](int i) -> const Element* {
                   const int32_t row = first_row + i;
                   if (row >= rows) {
                     return nullptr;
                   }
                   const int32_t query = static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
                   return params.q.row<Element>(sequence.batch, sequence.first + query,
                                                head_kv * params.group + row - query * params.group);
                 });
}

}  // namespace nsa
