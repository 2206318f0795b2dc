// What the kernels of compress are told. A chunk is d tokens of a sequence, block m is its chunks m .. m + l/d - 1, and
// kernels work on rows: rows of chunks, rows of blocks, and groups of d tokens.
#pragma once

#include "common/params.h"

namespace nsa {

// A row of a packed call's chunks.
struct alignas(16) PackedChunk {
  int32_t token;   // its first one, or -1: the row holds no chunk
  int32_t index;   // among the chunks of its sequence
  int32_t blocks;  // of its sequence; 0 in a row without a chunk
  int32_t block;   // the row of the block that starts here, when index < blocks
};

// Dense: the rows of a sequence follow each other, `chunks` or `blocks` of them. Packed: the sequence that starts at
// token c has its first chunk in row floor(c / d), so chunks need no running sum and a token finds its chunk by itself;
// rows of blocks have no gaps, as the caller wants them. Either way there are sum T / d rows, and the last ones may
// hold nothing.
struct BlockLayout {
  int64_t tokens;  // dense: of every sequence; packed: sum of all
  int64_t batch;
  int64_t block_size;    // l
  int64_t block_stride;  // d
  int32_t pieces;        // l / d
  int64_t num_blocks;    // rows of all sequences
  int64_t num_chunks;    // the same
  int64_t
      num_groups;  // groups of d consecutive tokens, the last of a dense sequence or of all packed ones perhaps short

  int64_t blocks;  // dense: of every sequence
  int64_t chunks;
  Divisor by_blocks;
  Divisor by_chunks;
  Divisor by_groups;  // of every sequence

  const int32_t* cumulative_tokens;  // packed: (B + 1,), else null
  int32_t* cumulative_blocks;        // packed: (B + 1,)
  int32_t* block_chunks;             // packed: (num_blocks,): the row of its first chunk, -1 where there is no block
  PackedChunk* packed_chunks;        // packed: (num_chunks,)

  NSA_HOST_DEVICE bool packed() const { return cumulative_tokens != nullptr; }
};

// (rows, H, width) with rows of chunks or of blocks. Strides count elements; the width's is 1.
struct ChunkRows {
  void* data;
  int64_t row_stride;
  int64_t head_stride;

  template <typename Element>
  NSA_HOST_DEVICE Element* row(int64_t row, int64_t head) const {
    return static_cast<Element*>(data) + row * row_stride + head * head_stride;
  }
};

// What a block of threads does for each of its rows: (tokens,) heads, and pieces of `kWidth` columns, by number.
struct RowItems {
  int32_t heads;
  int32_t width;  // columns
  uint32_t per_token;
  uint32_t count;
  Divisor by_columns;  // pieces of columns of a head
  Divisor by_token;
};

// A number for each head and column, or one for all heads (head stride 0), or none (null).
struct BiasView {
  const float* data;
  int64_t head_stride;
};

// Between tokens and rows of chunks, in either direction.
struct MoveChunksParams {
  BlockLayout layout;
  RowItems items;
  TensorView tokens;  // (B, T, H, D)
  ChunkRows chunks;   // (chunks, H, d D)
};

struct MeanParams {
  BlockLayout layout;
  RowItems items;
  TensorView tokens;  // (B, T, H, D): x or its gradient
  ChunkRows blocks;   // (blocks, H, D): the means or their gradient
};

// out[m] = act(bias + sum over i < pieces of parts[first + i, :, i]); zero where there is no block.
struct ShiftAddParams {
  BlockLayout layout;
  RowItems items;
  int32_t pieces;
  bool from_blocks;  // the rows of `parts` are blocks (and there is one piece), not chunks
  ChunkRows parts;   // (chunks, H, pieces, O)
  BiasView bias;
  ChunkRows out;  // (blocks, H, O)
};

// grad_parts[c, :, i] = act'(bias + sum over j of parts[m + j, :, j]) grad[m] for the block m that starts i chunks
// before c, zero where there is none.
struct SpreadParams {
  BlockLayout layout;
  RowItems items;
  ChunkRows grad;   // (blocks, H, O)
  ChunkRows parts;  // (chunks, H, pieces, O), with an activation only
  BiasView bias;
  ChunkRows grad_parts;  // (chunks, H, pieces, O)
};

}  // namespace nsa
