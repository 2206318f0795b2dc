#include "compression/cpu/blocks.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

#include "common/geometry.h"

namespace nsa {
namespace {

// Rows 0 .. count - 1 dealt out to sequences of the given lengths: which sequence each belongs to, and its place in it.
// Rows past the last sequence are not valid and point at place 0 of sequence 0.
struct Places {
  at::Tensor sequence, place, valid;
};

Places deal_out(const at::Tensor& lengths, int64_t count) {
  const at::Tensor ends = lengths.cumsum(0);
  const at::Tensor rows = at::arange(count, lengths.options());
  const at::Tensor sequence = at::searchsorted(ends, rows, /*out_int32=*/false, /*right=*/true);
  const at::Tensor valid = sequence < lengths.size(0);
  const at::Tensor safe = sequence.where(valid, at::zeros_like(sequence));
  const at::Tensor place = (rows - (ends - lengths).index_select(0, safe)).where(valid, at::zeros_like(rows));
  return {safe, place, valid};
}

}  // namespace

CompressionBlocks::CompressionBlocks(const at::Tensor& x, int64_t block_size, int64_t block_stride,
                                     const Packing& packing)
    : stride_(block_stride), pieces_(block_size / block_stride) {
  const int64_t tokens = x.size(-3);
  if (packing.packed()) {
    lay_out_packed(packing.cu_seqlens_k->to(at::kLong), tokens, block_size);
    return;
  }
  batch_ = x.size(0);
  blocks_per_sequence_ = num_compressed_blocks(tokens, block_size, block_stride);
  chunks_per_sequence_ = blocks_per_sequence_ == 0 ? 0 : blocks_per_sequence_ + pieces_ - 1;
  num_blocks_ = batch_ * blocks_per_sequence_;
}

void CompressionBlocks::lay_out_packed(const at::Tensor& cu_seqlens, int64_t tokens, int64_t block_size) {
  const int64_t batch = cu_seqlens.size(0) - 1;
  // A sequence of T tokens has at most T/d blocks and T/d chunks: sums known without asking the device.
  num_blocks_ = batch == 0 ? 0 : tokens / stride_;
  if (num_blocks_ == 0) {
    return;
  }
  const at::Tensor starts = cu_seqlens.narrow(0, 0, batch);
  const at::Tensor lengths = cu_seqlens.narrow(0, 1, batch) - starts;
  const at::Tensor blocks = ((lengths - block_size).div(at::Scalar(stride_), "floor") + 1)
                                .clamp_min(0)
                                .where(lengths >= block_size, at::zeros_like(lengths));
  const at::Tensor chunks = (blocks + (pieces_ - 1)).where(blocks > 0, at::zeros_like(blocks));
  const Places chunk = deal_out(chunks, num_blocks_);
  const Places block = deal_out(blocks, num_blocks_);
  const at::Tensor first_tokens =
      (starts.index_select(0, chunk.sequence) + chunk.place * stride_).where(chunk.valid, at::zeros_like(chunk.place));
  chunk_tokens_ = (first_tokens.unsqueeze(1) + at::arange(stride_, first_tokens.options())).flatten();
  const at::Tensor first_chunks = (chunks.cumsum(0) - chunks).index_select(0, block.sequence) + block.place;
  block_chunks_ = first_chunks.where(block.valid, at::zeros_like(first_chunks));
  chunk_valid_ = chunk.valid.view({-1, 1, 1});
  block_valid_ = block.valid.view({-1, 1, 1});
}

at::Tensor CompressionBlocks::gather_chunks(const at::Tensor& x) const {
  const int64_t heads = x.size(-2);
  const int64_t width = x.size(-1);
  at::Tensor tokens;
  if (chunk_tokens_.defined()) {
    tokens = x.index_select(0, chunk_tokens_);
  } else {
    tokens = x.narrow(1, 0, chunks_per_sequence_ * stride_);
  }
  return tokens.reshape({-1, stride_, heads, width}).transpose(1, 2).reshape({-1, heads, stride_ * width});
}

at::Tensor CompressionBlocks::scatter_chunks(const at::Tensor& grad_chunks, const at::Tensor& x) const {
  const int64_t heads = x.size(-2);
  const int64_t width = x.size(-1);
  at::Tensor grad = at::zeros(x.sizes(), grad_chunks.options());
  const at::Tensor tokens = grad_chunks.view({-1, heads, stride_, width}).transpose(1, 2);
  if (chunk_tokens_.defined()) {
    // Chunks in no sequence all point at token 0 and add nothing to it.
    const at::Tensor kept = tokens.masked_fill(chunk_valid_.logical_not().unsqueeze(-1), 0);
    grad.index_add_(0, chunk_tokens_, kept.reshape({-1, heads, width}));
  } else {
    grad.narrow(1, 0, chunks_per_sequence_ * stride_).copy_(tokens.reshape({batch_, -1, heads, width}));
  }
  return grad;
}

at::Tensor CompressionBlocks::chunks_of_piece(int64_t piece) const {
  return (block_chunks_ + piece).clamp_max(num_blocks_ - 1);
}

at::Tensor CompressionBlocks::shift_and_add(const at::Tensor& pieces) const {
  const int64_t heads = pieces.size(1);
  const int64_t width = pieces.size(3);
  at::Tensor sum;
  for (int64_t i = 0; i < pieces_; ++i) {
    const at::Tensor piece = pieces.select(2, i);
    const at::Tensor shifted = block_chunks_.defined()
                                   ? piece.index_select(0, chunks_of_piece(i))
                                   : piece.reshape({batch_, -1, heads, width}).narrow(1, i, blocks_per_sequence_);
    sum = i == 0 ? shifted.clone() : sum.add_(shifted);
  }
  return sum.reshape({-1, heads, width});
}

at::Tensor CompressionBlocks::shift_and_spread(const at::Tensor& grad_blocks) const {
  const int64_t heads = grad_blocks.size(1);
  const int64_t width = grad_blocks.size(2);
  const int64_t chunks = block_chunks_.defined() ? num_blocks_ : batch_ * chunks_per_sequence_;
  at::Tensor grad = at::zeros({chunks, heads, pieces_, width}, grad_blocks.options());
  for (int64_t i = 0; i < pieces_; ++i) {
    at::Tensor piece = grad.select(2, i);
    if (block_chunks_.defined()) {
      piece.index_add_(0, chunks_of_piece(i), grad_blocks);
    } else {
      piece.view({batch_, -1, heads, width})
          .narrow(1, i, blocks_per_sequence_)
          .copy_(grad_blocks.view({batch_, -1, heads, width}));
    }
  }
  return grad;
}

at::Tensor CompressionBlocks::mask(const at::Tensor& blocks) const {
  return block_valid_.defined() ? blocks.masked_fill(block_valid_.logical_not(), 0) : blocks;
}

at::Tensor CompressionBlocks::to_output(const at::Tensor& blocks) const {
  return block_valid_.defined() ? blocks : blocks.view({batch_, -1, blocks.size(1), blocks.size(2)});
}

at::Tensor CompressionBlocks::from_output(const at::Tensor& output) const {
  return mask(output.reshape({-1, output.size(-2), output.size(-1)}));
}

}  // namespace nsa
