// What stands around Hopper's asynchronous matrix products (common/sm90/products.cuh), of a warpgroup's 64 rows at
// once, and the barriers that warpgroups meet at: one thin function per instruction.
#pragma once

#include "common/sm90/copy.cuh"

namespace nsa {

constexpr int kWarpgroup = 128;  // threads

// Before a warpgroup's first product, and after it wrote registers that a product reads or adds to.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits until at most `kPending` of the newest groups are under way.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving what reads or writes an accumulator across this place.
template <int kTiles>
__device__ inline void hold(float (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
  }
}

// Ordinary writes to shared memory, before products and copies that read them.
__device__ inline void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Named barriers, 1 to 15, between `threads` threads.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// How a product finds a PanelTile, with 128-byte swizzling, from `address` on: groups of eight rows lie 1024 bytes
// apart, and, where the columns of the matrix are those of the tile, panels lie `panel_bytes` apart.
__device__ inline uint64_t tile_descriptor(uint32_t address, uint32_t panel_bytes) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | static_cast<uint64_t>(panel_bytes / 16) << 16 |
         (address & 0x3ffff) / 16;
}
// The same, `bytes` further.
__device__ inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + bytes / 16; }

template <typename Element>
struct MatrixTypes;
template <>
struct MatrixTypes<Half> {
  static constexpr char kSuffix[] = ".f32.f16.f16";
};
template <>
struct MatrixTypes<BFloat16> {
  static constexpr char kSuffix[] = ".f32.bf16.bf16";
};

}  // namespace nsa
