// Launches: shared memory beyond the default, the grid's limit, and the check afterwards.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace nsa {

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

}  // namespace nsa
