// Attention over a range of keys on the GPU: what host code may call.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/params.h"

namespace nsa {

// float16 or bfloat16 on tensor cores, sm_80 and later; with kernels of their own for sm_90a. Rows of every
// tensor start at multiples of 16 bytes, and widths are multiples of 8, at most 256.
//
// The forward returns whether it wrote params.sum, too: the kernel for sm_90a can. Where it could not, and params.out
// is null, nothing is written.
bool launch_range_forward(const RangeForwardParams& params, ElementType type, cudaStream_t stream);
void launch_range_backward(const RangeBackwardParams& params, ElementType type, cudaStream_t stream);

// Into how many splits, of how many rows, launch_range_backward should cut the rows that see a tile of keys, so that
// the GPU's multiprocessors all have work; `partials` must then hold this many floats.
struct RangeSplits {
  int32_t splits;
  int32_t rows_per_split;
  int64_t partial_floats;
};
RangeSplits choose_range_splits(const RangeBackwardParams& params, ElementType type, int multiprocessors);

// float32, without tensor cores: any head dimensions up to 256, any strides whose last is 1.
void launch_range_forward_plain(const RangeForwardParams& params, cudaStream_t stream);
// Writes all of grad_q, grad_k and grad_v, also where nobody sees a key; needs no splits and no partials.
void launch_range_backward_plain(const RangeBackwardParams& params, cudaStream_t stream);

// Packed sequences: how many compressed keys come before each, (B + 1,).
void launch_cumulative_blocks(const Sequences& sequences, int32_t block_size, int32_t block_stride, int32_t* cumulative,
                              cudaStream_t stream);

}  // namespace nsa
