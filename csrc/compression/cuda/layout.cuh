// Where chunks, blocks and tokens lie: device code for both layouts, and the kernels that fill the tables of packed
// calls.
//
// Tables: one warp sums up the blocks before each sequence; then a thread for each row finds the sequence
// of the chunk in it by a binary search, and tells the row of the block that starts there where its first chunk is.
#pragma once

#include "compression/params.h"

namespace nsa {

struct ChunkPlace {
  int64_t batch;  // 0 when packed
  int64_t token;  // its first, counted from the batch entry's; negative: no chunk
  int64_t index;
  int64_t blocks;
  int64_t block;

  // Whether a block starts `piece` chunks before; its row is block - piece.
  __device__ bool has_block(int64_t piece) const { return index >= piece && index - piece < blocks; }
};

__device__ inline ChunkPlace no_chunk() { return {0, -1, 0, 0, 0}; }

// The row of a block's first chunk; negative where there is no block.
__device__ inline int64_t first_chunk(const BlockLayout& layout, uint32_t block) {
  if (layout.packed()) {
    return layout.block_chunks[block];
  }
  const int64_t sequence = layout.by_blocks.divide(block);
  return sequence * layout.chunks + (block - sequence * layout.blocks);
}

__device__ inline ChunkPlace place_of_chunk(const BlockLayout& layout, uint32_t row) {
  if (layout.packed()) {
    const PackedChunk chunk = layout.packed_chunks[row];
    return {0, chunk.token, chunk.index, chunk.blocks, chunk.block};
  }
  const int64_t sequence = layout.by_chunks.divide(row);
  const int64_t index = row - sequence * layout.chunks;
  return {sequence, index * layout.block_stride, index, layout.blocks, sequence * layout.blocks + index};
}

// d consecutive tokens and the chunks that they may belong to. A packed token t of the sequence that starts at c is in
// row floor(c / d) + floor((t - c) / d), which is floor(t / d) or the row before.
struct TokenGroup {
  int64_t batch;
  int64_t first_token;
  int64_t count;
  int64_t row;  // of chunk `own`; `before` lies in the row before
  ChunkPlace own;
  ChunkPlace before;

  __device__ TokenGroup(const BlockLayout& layout, uint32_t group)
      : batch(0), row(group), own(no_chunk()), before(no_chunk()) {
    if (!layout.packed()) {
      batch = layout.by_groups.divide(group);
      const int64_t index = group - batch * layout.by_groups.divisor;
      first_token = index * layout.block_stride;
      if (index < layout.chunks) {
        row = batch * layout.chunks + index;
        own = {batch, first_token, index, layout.blocks, batch * layout.blocks + index};
      }
    } else {
      first_token = int64_t{group} * layout.block_stride;
      if (group < layout.num_chunks) {
        own = place_of_chunk(layout, group);
      }
      if (group > 0) {
        before = place_of_chunk(layout, group - 1);
      }
    }
    count = min_of(layout.block_stride, layout.tokens - first_token);
  }

  __device__ bool in_own(int64_t token) const { return own.token >= 0 && token >= own.token; }
  __device__ bool in_before(int64_t token, int64_t block_stride) const {
    return before.token >= 0 && token < before.token + block_stride;
  }
};

// Blocks of a sequence; none of one that its cumulative lengths put outside the tensor.
__device__ inline int64_t count_blocks(const BlockLayout& layout, int64_t sequence) {
  const int64_t begin = layout.cumulative_tokens[sequence];
  const int64_t end = layout.cumulative_tokens[sequence + 1];
  return begin < 0 || end > layout.tokens ? 0
                                          : num_compressed_blocks(end - begin, layout.block_size, layout.block_stride);
}

// By one warp: 32 sequences a step.
__global__ void __launch_bounds__(32) sum_up_blocks(const __grid_constant__ BlockLayout layout) {
  const int lane = static_cast<int>(threadIdx.x);
  int64_t before = 0;
  for (int64_t first = 0; first < layout.batch; first += 32) {
    const int64_t sequence = first + lane;
    const int64_t blocks = sequence < layout.batch ? count_blocks(layout, sequence) : 0;
    int64_t sum = blocks;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
      sum += lane >= distance ? other : 0;
    }
    if (sequence < layout.batch) {
      layout.cumulative_blocks[sequence] = static_cast<int32_t>(before + sum - blocks);
    }
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) {
    layout.cumulative_blocks[layout.batch] = static_cast<int32_t>(before);
  }
}

constexpr int kTableThreads = 128;

__global__ void __launch_bounds__(kTableThreads) fill_tables(const __grid_constant__ BlockLayout layout) {
  const int64_t row = int64_t{blockIdx.x} * kTableThreads + threadIdx.x;
  if (row >= layout.num_chunks) {
    return;
  }
  if (row >= layout.cumulative_blocks[layout.batch]) {
    layout.block_chunks[row] = -1;
  }
  PackedChunk chunk{-1, 0, 0, 0};
  int64_t low = 0;
  int64_t high = layout.batch - 1;
  while (low < high) {  // the last sequence whose first chunk lies in this row or before it
    const int64_t middle = (low + high + 1) / 2;
    if (layout.cumulative_tokens[middle] / layout.block_stride <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (layout.batch > 0) {
    const int64_t begin = layout.cumulative_tokens[low];
    const int64_t index = row - begin / layout.block_stride;
    const int64_t blocks = count_blocks(layout, low);
    const int64_t block = layout.cumulative_blocks[low] + index;
    const bool fits = index >= 0 && block - index + blocks <= layout.num_blocks;  // not so when lengths decrease
    if (fits && blocks > 0 && index < blocks + layout.pieces - 1) {
      chunk = {static_cast<int32_t>(begin + index * layout.block_stride), static_cast<int32_t>(index),
               static_cast<int32_t>(blocks), static_cast<int32_t>(block)};
      if (index < blocks) {
        layout.block_chunks[block] = static_cast<int32_t>(row);
      }
    }
  }
  layout.packed_chunks[row] = chunk;
}

}  // namespace nsa
