// Launches of a decoding step: each of its kernels after the first may start while the one in front still runs.
#pragma once

#include "common/check.h"
#include "common/plan.h"

namespace nsa {

template <typename Params>
void launch_in_chain(void (*kernel)(Params), dim3 grid, int threads, const KernelTile& tile, bool first,
                     cudaStream_t stream, const char* name, const Params& params) {
  const auto bytes = static_cast<unsigned>(tile.dynamic_bytes);
  if (bytes > 32 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               name);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = first ? 0 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace nsa
