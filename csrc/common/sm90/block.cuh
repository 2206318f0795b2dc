// What kernels for Hopper are made of: shared memory, warpgroups that feed and that consume, whole products.
#pragma once

#include "common/sm90/products.cuh"

namespace nsa {

// Sizes of kernels whose first warpgroup feeds the others: what they are given, and what follows.
template <typename Element_, int kDimK_, int kDimV_, int kConsumers_, int kKeys_>
struct ConsumersShape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups; one more produces
  static constexpr int kKeys = kKeys_;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  using KTile = PanelTile<Element, kKeys, kDimK>;
  using VTile = PanelTile<Element, kKeys, kDimV>;
};

template <typename Shared>
__device__ inline Shared& shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return *reinterpret_cast<Shared*>(shared_bytes);
}

// The first warpgroup feeds, feed(), with few registers; the others consume with many: consume(which of them).
template <typename Shape, typename Feed, typename Consume>
__device__ inline void split_warpgroups(const Feed& feed, const Consume& consume) {
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    shrink_registers<Shape::kProducerRegisters>();
    feed();
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    consume(warpgroup - 1);
  }
}

// Starts c = a b^T, of two tiles' rows. Both descriptors are of whole tiles.
template <typename Left, typename Right, int kTiles>
__device__ inline void start_product(float (&c)[kTiles][4], uint64_t a, uint64_t b) {
  hold(c);
  fence_products();
#pragma unroll
  for (int column = 0; column < Left::kColumns; column += 16) {
    const int panel = column / 64;
    const int inside = column % 64;
    multiply_async<typename Left::Element>(c, advance(a, 2 * (panel * Left::kPanelSize + inside)),
                                           advance(b, 2 * (panel * Right::kPanelSize + inside)), column != 0);
  }
  commit_products();
}

// Rows of a tile in shared memory become zeros from `first` on, before products that read them. By the threads of a
// warpgroup, which meet at `barrier`.
template <typename Tile>
__device__ inline void clear_rows_from(typename Tile::Element* tile, int32_t first, int barrier) {
#pragma unroll 1
  for (int i = 8 * first + fresh_thread() % kWarpgroup; i < 8 * Tile::kRows; i += kWarpgroup) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      *reinterpret_cast<uint4*>(tile + panel * Tile::kPanelSize + 8 * i) = uint4{};
    }
  }
  fence_shared_writes();
  sync_threads(barrier, kWarpgroup);
}

// The tile that a block of threads takes in a round. Every other round runs backwards, so that no block gets the
// longest of each.
__device__ inline int32_t tile_of_round(int32_t round, int32_t block, int32_t blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

}  // namespace nsa
