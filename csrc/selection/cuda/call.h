// Which blocks each query reads, on CUDA: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/geometry.h"
#include "host/options.h"

namespace nsa::cuda {

// Refuses what select_blocks does not take on CUDA.
void check_selection_supported(const at::Tensor& q, const at::Tensor& k_cmp, int64_t select_size, int64_t num_selected,
                               const AttentionOptions& options);

// Writes block_indices, which is allocated and contiguous.
void select_blocks(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& lse, int64_t select_size,
                   int64_t num_selected, const ForcedBlocks& forced, const AttentionOptions& options,
                   const at::Tensor& block_indices);

}  // namespace nsa::cuda
