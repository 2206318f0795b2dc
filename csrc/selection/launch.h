// The choice of blocks on the GPU: what host code may call.
#pragma once

#include <cuda_runtime_api.h>

#include "selection/params.h"

namespace nsa {

constexpr int32_t kMostSelectedOnCuda = 64;  // n
constexpr int32_t kMostPiecesOnCuda = 64;    // l / d and l' / d

// 16-bit types run on tensor cores where a group has at most 32 heads and l / d and l' / d are at most 32: rows of q and k
// then start at multiples of 16 bytes, and their width is a multiple of 8, at most 256. All else is computed plainly.
void launch_select_blocks(const SelectBlocksParams& params, ElementType type, cudaStream_t stream);

}  // namespace nsa
