// Blocks of threads of a cluster: what they tell each other.
#pragma once

#include "common/sm90/copy.cuh"

namespace nsa {

// All threads of the cluster meet: arrive, later wait. What was written before arriving is seen after waiting.
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }
__device__ inline void sync_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}

// Where `address` lies in the shared memory of another block of threads of the cluster.
__device__ inline uint32_t address_in(uint32_t address, int32_t block) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(block));
  return there;
}
__device__ inline void store_there(uint32_t address, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;\n" ::"r"(address), "r"(x) : "memory");
}
__device__ inline void store_there(uint32_t address, float x, float y) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(x), "f"(y) : "memory");
}

}  // namespace nsa
