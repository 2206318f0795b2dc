// Launches of kernels for Hopper: which tensors their copies can read, and where they run.
#pragma once

#include "common/launch.cuh"
#include "common/matrix.cuh"
#include "common/tensor_map.h"

namespace nsa {

template <typename Element>
constexpr ElementType kElementType = __is_same(Element, Half) ? ElementType::kFloat16 : ElementType::kBFloat16;

// Whether the copy engine can read a tensor: addresses in units of 16 bytes, and none read twice.
inline bool copies_by_map(const TensorView& x, int64_t batch, int64_t length, int64_t heads) {
  const auto fits = [](int64_t stride, int64_t size) { return size <= 1 || (stride > 0 && stride % 8 == 0); };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.width % 8 == 0 && fits(x.batch_stride, batch) &&
         fits(x.token_stride, length) && fits(x.head_stride, heads);
}

inline int multiprocessors(const char* name) {
  int device = 0;
  int count = 0;
  check_cuda(cudaGetDevice(&device), name);
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), name);
  return count;
}

// Whether this GPU runs sm_90a code, and the library was built for it: elsewhere the kernel is empty, and needs next to
// no registers.
template <typename Params>
bool runs_on_this_device(void (*kernel)(Params), const char* name) {
  constexpr int kMoreThanEmpty = 64;
  if (portable_kernels_only()) {
    return false;
  }
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
  return attributes.numRegs > kMoreThanEmpty;
}

}  // namespace nsa
