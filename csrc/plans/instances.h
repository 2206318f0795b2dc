// Every kernel that this library is compiled for, with its tile and its shared memory. No torch.
#pragma once

#include <string>
#include <vector>

#include "common/tiles.h"

namespace nsa {

struct KernelInstance {
  std::string kernel;   // by the name that a profile shows
  std::string element;  // "float32", "float16", "bfloat16", or "any": the sizes are the same
  int32_t dim_k = 0;    // of its tiles; 0: any
  int32_t dim_v = 0;
  std::string variant;  // of those that share all this
  KernelTile tile;      // with the longest lists, where it has lists in shared memory
};

std::vector<KernelInstance> kernel_instances();

}  // namespace nsa
