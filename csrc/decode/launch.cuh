// Launches of a decoding step: each of its kernels after the first may start while the one in front still runs.
#pragma once

#include "common/check.h"
#include "common/plan.h"

namespace nsa {

template <typename Params>
void launch_in_chain(void (*kernel)(Params), dim3 grid, int threads, const KernelTile& tile, bool first,
                     cudaStream_t stream, const char* name, const Params& params, int cluster = 1) {
  const auto bytes = static_cast<unsigned>(tile.dynamic_bytes);
  if (bytes > 32 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               name);
  }
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  const bool clustered = cluster > 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = clustered ? attributes : attributes + 1;
  config.numAttrs = (clustered ? 1u : 0u) + (first ? 0u : 1u);
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace nsa
