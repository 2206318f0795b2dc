// The check after a call of CUDA's runtime.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace nsa {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that the next call does not find it
    throw std::runtime_error(std::string("nsa_torch: ") + what + ": " + cudaGetErrorString(error));
  }
}

}  // namespace nsa
