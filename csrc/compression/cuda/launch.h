// The kernels of compress: what host code may call. `type` is the element type of the call; strides and widths of views
// count its elements. RowItems are filled in here.
#pragma once

#include <cuda_runtime_api.h>

#include "compression/params.h"

namespace nsa {

// What the first layer is followed by.
enum class Activation { kNone, kGelu };

// Fills cumulative_blocks, block_chunks and packed_chunks.
void launch_packed_layout(const BlockLayout& layout, cudaStream_t stream);

// Chunks of no sequence become zeros.
void launch_gather_chunks(const BlockLayout& layout, const TensorView& x, int32_t heads, const ChunkRows& chunks,
                          ElementType type, cudaStream_t stream);
// Tokens of no chunk get zeros.
void launch_scatter_chunks(const BlockLayout& layout, const ChunkRows& grad_chunks, int32_t heads,
                           const TensorView& grad_x, ElementType type, cudaStream_t stream);

void launch_mean_forward(const BlockLayout& layout, const TensorView& x, int32_t heads, const ChunkRows& out,
                         ElementType type, cudaStream_t stream);
void launch_mean_backward(const BlockLayout& layout, const ChunkRows& grad_out, int32_t heads, const TensorView& grad_x,
                          ElementType type, cudaStream_t stream);

// `parts` are float32, `out` is of `type`; `items` need heads and width only.
void launch_shift_and_add(ShiftAddParams params, Activation activation, ElementType type, cudaStream_t stream);
// Copies rows of blocks, with zeros for rows without a block. `parts` and `out` are of `type`.
void launch_mask_blocks(ShiftAddParams params, ElementType type, cudaStream_t stream);
// `grad` is float32 before an activation, else of `type`; `parts` are float32, `grad_parts` of `type`.
void launch_shift_and_spread(SpreadParams params, Activation activation, ElementType type, cudaStream_t stream);

}  // namespace nsa
