// Kernels of a step that start before the one in front has ended (programmatic dependent launch), from sm_90 on.
#pragma once

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

}  // namespace nsa
