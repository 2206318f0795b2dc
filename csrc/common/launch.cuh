// Launches: shared memory beyond the default, the grid's limit, and the check afterwards.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nsa {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that the next call does not find it
    throw std::runtime_error(std::string("nsa_torch: ") + what + ": " + cudaGetErrorString(error));
  }
}

// One-dimensional: a grid's x reaches 2^31 - 1. A grid of no blocks is no launch.
template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
            const char* name, const Params& params) {
  if (blocks == 0) {
    return;
  }
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string("nsa_torch: ") + name + ": too many tiles for one launch");
  }
  if (shared_bytes > 32 * 1024) {  // the default limit, 48 KB, holds what the kernel declares as well
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params);
  check_cuda(cudaGetLastError(), name);
}

// Whether to leave out kernels made for one GPU: the environment's NSA_TORCH_KERNELS is "portable", for comparisons.
inline bool portable_kernels_only() {
  static const bool result = [] {
    const char* wanted = std::getenv("NSA_TORCH_KERNELS");
    return wanted != nullptr && std::string(wanted) == "portable";
  }();
  return result;
}

}  // namespace nsa
