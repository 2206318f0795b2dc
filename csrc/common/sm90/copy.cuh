// Hopper's copy engine and the barriers that its copies complete on: one thin function per instruction.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/sm80/mma.cuh"

namespace nsa {

// A barrier in shared memory. Its phases are counted from 0; `parity` is the phase's lowest bit. A waiter may lag
// behind the current phase by one, no more.
using Barrier = uint64_t;

__device__ inline void init_barrier(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
// Each thread arrives for itself that wrote what others read by ordinary instructions, or the other way round:
// racecheck follows nothing else. Of buffers that copies fill or empty, one lane may for its warp, after `__syncwarp`
// or a product.
__device__ inline void arrive(Barrier* barrier, uint32_t arrivals = 1) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Arrives once `loaded` is there: a number that depends on all that was loaded from the buffer. An arrival may overtake
// loads that come before it, which ptxas does not wait for, and let the next copy come before they are done.
__device__ inline void arrive_loaded(Barrier* barrier, uint32_t loaded) {
  asm volatile(
      "{\n"
      ".reg .pred odd;\n"
      "setp.eq.u32 odd, %1, 0x7fc07fc1;\n"
      "@odd mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], 1;\n"
      "@!odd mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(loaded)
      : "memory");
}
// Arrives, and lets the phase wait for so many bytes of copies too.
__device__ inline void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Arrives when all copies of single numbers that this thread started (common/sm80/mma.cuh) are complete.
__device__ inline void arrive_after_copies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline bool try_wait(Barrier* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// What a wait that never ends does: nothing, or in programs that test kernels, it gives up, and results are wrong. (A
// trap would be clearer, but ptxas then keeps to the registers that a thread has before it takes more.)
#if defined(NSA_BOUNDED_WAITS)
constexpr uint32_t kMostWaits = 1u << 22;
#else
constexpr uint32_t kMostWaits = 0;
#endif

template <typename Done>
__device__ inline void wait_until(const Done& done) {
  if constexpr (kMostWaits == 0) {
    while (!done()) {
    }
  } else {
    for (uint32_t i = 0; i != kMostWaits && !done(); ++i) {
    }
  }
}
__device__ inline void wait(Barrier* barrier, uint32_t parity) {
  wait_until([&] { return try_wait(barrier, parity); });
}

// Whether this is the one thread of a whole warp that goes on alone. Known to the compiler as such, so that it reads
// the operands of copies plainly, where it would otherwise go through all threads that may hold different ones.
__device__ inline bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// 16 bytes of shared memory.
__device__ inline uint4 load_chunk(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// A number in shared memory that one thread raises and others watch.
__device__ inline void publish(uint32_t* to, uint32_t value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;\n" ::"r"(shared_address(to)), "r"(value) : "memory");
}
__device__ inline uint32_t observe(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];\n" : "=r"(value) : "r"(shared_address(from)) : "memory");
  return value;
}

// Adds 1 to such a number, where what it tells of is in shared memory already, and known to be there: costs no fence.
// (A sum rather than a store, which racecheck would take for a race with those that watch.)
__device__ inline void raise(uint32_t* number) {
  asm volatile("red.relaxed.cta.shared::cta.add.u32 [%0], 1;\n" ::"r"(shared_address(number)) : "memory");
}

// A number in global memory that warps of any multiprocessor add to and watch.
__device__ inline void add_to_all(int32_t* to, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(to), "r"(value) : "memory");
}
__device__ inline int32_t observe_all(const int32_t* from) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline void add_floats(float4* to, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}

// Where a ring of buffers stands: the next fill's buffer, and the parity of its phase.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  // Of fill number `count`, from 0.
  __device__ static RingPlace of(uint32_t count) { return {static_cast<int>(count % kStages), count / kStages & 1}; }

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What the L2 cache does with the lines of a copy.
constexpr uint64_t kEvictNormal = 0x1000000000000000;
constexpr uint64_t kEvictFirst = 0x12f0000000000000;
constexpr uint64_t kEvictLast = 0x14f0000000000000;

// Copies a box of a (B, T, H, D) tensor, laid out as its map says, and counts its bytes on the barrier.
__device__ inline void copy_box(void* shared, const CUtensorMap* map, Barrier* barrier, int32_t column, int32_t head,
                                int32_t token, int32_t batch, uint64_t cache) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(token), "r"(batch), "l"(cache)
      : "memory");
}
// The other way round, the part inside of the tensor. The thread that copies waits until its copies have read shared
// memory, and in the end until they are done.
__device__ inline void store_box(const CUtensorMap* map, const void* shared, int32_t column, int32_t head,
                                 int32_t token, int32_t batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map),
               "r"(shared_address(shared)), "r"(column), "r"(head), "r"(token), "r"(batch)
               : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
__device__ inline void wait_until_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }
__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// A warpgroup gives registers of its own back, or takes them, until each of its threads has kCount.
template <int kCount>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

// Four 8 x 8 matrices, as load_matrices loads them.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// A tile as the copy engine writes it with 128-byte swizzling: panels of 64 columns one after the other, rows of 128
// bytes in each, whose 16-byte chunks change places with the row. It begins at a multiple of 1024 bytes.
template <typename Element_, int kRows_, int kColumns_>
struct PanelTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kPanels = kColumns / 64;
  static constexpr int kPanelSize = kRows * 64;  // elements
  static constexpr int kSize = kRows * kColumns;
  static_assert(kColumns % 64 == 0 && kRows % 8 == 0);

  uint32_t begin;  // in shared memory

  // As SharedTile's of the same names: common/sm80/tile.cuh.
  __device__ void load_left(uint32_t (&a)[4], int row, int column, int lane) const {
    load_matrices(a, address(row, column, lane & 15, lane >> 4));
  }
  __device__ void store_left(const uint32_t (&a)[4], int row, int column, int lane) const {
    store_matrices(address(row, column, lane & 15, lane >> 4), a);
  }
  // Where eight columns of a row lie.
  __device__ uint32_t chunk(int row, int index) const {
    return begin + index / 8 * (kPanelSize * 2) + row * 128 + ((index % 8 ^ (row & 7)) << 4);
  }
  __device__ void load_right_transposed(uint32_t (&b)[4], int row, int column, int lane) const {
    load_matrices(b, address(row, column, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
  }
  __device__ void load_right(uint32_t (&b)[4], int row, int column, int lane) const {
    load_matrices_transposed(b, address(row, column, lane & 15, lane >> 4));
  }

 private:
  __device__ uint32_t address(int row, int column, int lane_row, int lane_chunk) const {
    const uint32_t of_lane = begin + lane_row * 128 + ((lane_chunk ^ (lane_row & 7)) << 4);
    return (of_lane ^ (column % 64 / 8 << 4)) + row * 128 + column / 64 * (kPanelSize * 2);
  }
};

}  // namespace nsa
