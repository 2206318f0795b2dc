// Tables of packed sequences that a kernel makes.
#pragma once

#include <cuda_runtime_api.h>

#include "common/params.h"

namespace nsa {

// How many compressed keys come before each sequence, (B + 1,).
void launch_cumulative_blocks(const SequenceLayout& sequences, int32_t block_size, int32_t block_stride,
                              int32_t* cumulative, cudaStream_t stream);

}  // namespace nsa
