// The blocks of a call to compress, whatever the layout: which stride-d chunks of tokens there are, and which l/d of
// them make up each block. Overlapping blocks share chunks, so x is read once and never unfolded.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "host/packing.h"

namespace nsa {

class CompressionBlocks {
 public:
  // x is (B, T, H, D), or packed (sum T, H, D) with packing.cu_seqlens_k: then all tables are computed on x's device.
  CompressionBlocks(const at::Tensor& x, int64_t block_size, int64_t block_stride, const Packing& packing);

  // (chunks, H, d * D): the tokens of every chunk, flattened.
  at::Tensor gather_chunks(const at::Tensor& x) const;
  // Its transpose: the gradient of x.
  at::Tensor scatter_chunks(const at::Tensor& grad_chunks, const at::Tensor& x) const;

  // Block m = the sum over i < l/d of pieces[chunk(m) + i, :, i]: (chunks, H, l/d, O) -> (blocks, H, O).
  at::Tensor shift_and_add(const at::Tensor& pieces) const;
  // Its transpose: (blocks, H, O) -> (chunks, H, l/d, O).
  at::Tensor shift_and_spread(const at::Tensor& grad_blocks) const;

  // Zero in rows that belong to no sequence (packed only), which hold no block.
  at::Tensor mask(const at::Tensor& blocks) const;

  // (blocks, H, O) as the caller sees it: (B, M, H, O) or packed.
  at::Tensor to_output(const at::Tensor& blocks) const;
  at::Tensor from_output(const at::Tensor& output) const;

  int64_t pieces() const { return pieces_; }
  int64_t stride() const { return stride_; }
  bool empty() const { return num_blocks_ == 0; }

 private:
  // Packed: the chunk that is each block's `piece`-th. Rows that hold no block point at some chunk, whichever.
  at::Tensor chunks_of_piece(int64_t piece) const;
  void lay_out_packed(const at::Tensor& cu_seqlens, int64_t tokens, int64_t block_size);

  int64_t stride_;
  int64_t pieces_;
  int64_t batch_ = 1;
  int64_t chunks_per_sequence_ = 0;  // dense
  int64_t blocks_per_sequence_ = 0;  // dense
  int64_t num_blocks_ = 0;
  at::Tensor
      chunk_tokens_;  // packed: (chunks * d,) int64, the tokens of each chunk; chunks in no sequence read token 0
  at::Tensor block_chunks_;  // packed: (blocks,) int64, each block's first chunk
  at::Tensor chunk_valid_;   // packed: (chunks, 1, 1) bool
  at::Tensor block_valid_;   // packed: (blocks, 1, 1) bool
};

}  // namespace nsa
