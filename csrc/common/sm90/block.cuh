// How a block of threads is made up: its shared memory, and the warpgroups that feed and that consume.
#pragma once

#include "common/sm90/wgmma.cuh"

namespace nsa {

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

// The tile that a block of threads takes in a round. Every other round runs backwards, so that no block gets the
// longest of each.
__device__ inline int32_t tile_of_round(int32_t round, int32_t block, int32_t blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

}  // namespace nsa
