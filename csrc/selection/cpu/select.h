// Which blocks each query reads, on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "common/geometry.h"
#include "host/packing.h"

namespace nsa::cpu {

struct SelectionOptions {
  CompressedRange range;
  int64_t select_size;
  int64_t num_selected;
  ForcedBlocks forced;
};

// Writes block_indices, which is allocated and contiguous.
void select_blocks(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& lse, double scale,
                   const SelectionOptions& options, const std::vector<SequencePlace>& sequences,
                   const at::Tensor& block_indices);

}  // namespace nsa::cpu
