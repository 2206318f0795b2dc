// Launches of kernels for Hopper: tensor maps for their copies, and how many blocks of threads stay on the GPU.
#pragma once

#include "common/launch.cuh"
#include "common/sm80/mma.cuh"
#include "common/sm90/tensor_map.h"

namespace nsa {

template <typename Element>
constexpr ElementType kElementType = __is_same(Element, Half) ? ElementType::kFloat16 : ElementType::kBFloat16;

inline int multiprocessors(const char* name) {
  int device = 0;
  int count = 0;
  check_cuda(cudaGetDevice(&device), name);
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), name);
  return count;
}

}  // namespace nsa
