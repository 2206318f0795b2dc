// What the kernels of a call to compress are told: from tensors to layouts and views.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "compression/cpu/phi.h"
#include "compression/params.h"
#include "compression/plan.h"
#include "host/cuda/params.h"
#include "host/packing.h"

namespace nsa::cuda {

// What all kernels of a call are told. The tables are kept alive beside the layout that points to them.
struct CompressCall {
  ElementType type;
  int32_t heads;
  cudaStream_t stream;
  BlockLayout layout;
  CompressPlan plan;
  at::Tensor cumulative_tokens, cumulative_blocks, block_chunks, packed_chunks;
};

// Whether any sequence may have a block; packed ones can't be asked.
bool has_blocks(const at::Tensor& x, int64_t block_size);

// For x that has_blocks, on the current device and stream.
CompressCall lay_out(const at::Tensor& x, const PhiWeights& weights, int64_t block_size, int64_t block_stride,
                     const Packing& packing, const std::optional<PhiMask>& backward);

// (rows, H, ...), contiguous within a head.
ChunkRows chunk_rows_of(const at::Tensor& tensor);
// (H, O), (1, O) or (O), float32; undefined: none.
BiasView bias_of(const at::Tensor& bias);

}  // namespace nsa::cuda
