// Kernels of a step that start before the one in front has ended (programmatic dependent launch), from sm_90 on.
#pragma once

#include "decode/params.h"

namespace nsa {

// Until all that the kernel in front wrote is there.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be put on the GPU, as soon as there is room; it waits in its turn.
__device__ inline void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Numbers from a row of kept scores to the next: a multiple of a chunk, and rows 8 banks apart.
__host__ __device__ constexpr int32_t kept_pitch(int32_t keys, int32_t chunk) {
  return (keys + chunk - 1) / chunk * chunk + 8;
}

}  // namespace nsa
