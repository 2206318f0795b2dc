// Tiles of 16-bit elements in shared memory: rows of kColumns, in which 16-byte chunks change places with the row, so
// that neither ldmatrix nor row-wise stores meet bank conflicts; and the fragments of mma.m16n8k16 read from them.
#pragma once

#include "common/sm80/mma.cuh"

namespace nsa {

constexpr int kChunk = 8;  // elements of 16 bits in 16 bytes

template <typename Element_, int kRows_, int kColumns_>
struct SharedTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunks = kColumns / kChunk;
  static constexpr int kSize = kRows * kColumns;  // elements
  static_assert(kColumns % 64 == 0);

  Element* data;

  __device__ Element* chunk(int row, int index) const { return data + row * kColumns + (index ^ (row & 7)) * kChunk; }

  // Starts to copy rows `first`, `first + step`, ... from global memory: `source(row)` gives a row's address, or null
  // for a row of zeros; columns from `width` on are zeros too. `anywhere` is a valid address. By `threads` threads,
  // this one being number `thread`.
  template <typename Source>
  __device__ void copy_rows(int width, const void* anywhere, int thread, int threads, const Source& source) const {
#pragma unroll 1
    for (int i = thread; i < kRows * kChunks; i += threads) {
      const int row = i / kChunks;
      const int index = i % kChunks;
      const Element* from = source(row);
      const bool valid = from != nullptr && index * kChunk < width;
      copy_async(chunk(row, index), valid ? static_cast<const void*>(from + index * kChunk) : anywhere, valid);
    }
  }

  // The same for rows that lie `stride` elements apart, of which the first `count` exist. kThreads threads.
  template <int kThreads>
  __device__ void copy_consecutive(const void* first, int64_t stride, int count, int width, int thread) const {
    static_assert(kSize / kChunk % kThreads == 0);
    const Element* from = static_cast<const Element*>(first);
    if constexpr (kThreads % kChunks == 0) {
      const int index = thread % kChunks;
      int row = thread / kChunks;
      const Element* at = from + row * stride + index * kChunk;
      if (index * kChunk >= width) {
        count = 0;
      }
#pragma unroll
      for (int i = 0; i < kSize / kChunk / kThreads; ++i) {
        copy_async(chunk(row, index), row < count ? at : from, row < count);
        row += kThreads / kChunks;
        at += kThreads / kChunks * stride;
      }
    } else {
#pragma unroll 1
      for (int i = thread; i < kRows * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const int index = i % kChunks;
        const bool valid = row < count && index * kChunk < width;
        copy_async(chunk(row, index), valid ? from + row * stride + index * kChunk : from, valid);
      }
    }
  }

  // The 16 x 16 matrix at (row, column) as the left operand. `row` and `column` are multiples of 16 here and below.
  __device__ void load_left(uint32_t (&a)[4], int row, int column, int lane) const {
    load_matrices(a, address(row, column, lane & 15, lane >> 4));
  }
  // Rows [row, row + 16) as the 16 columns of a right operand, k along [column, column + 16): a product with the
  // transposed tile. b[0], b[1] belong to the first eight of the rows, b[2], b[3] to the others.
  __device__ void load_right_transposed(uint32_t (&b)[4], int row, int column, int lane) const {
    load_matrices(b, address(row, column, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
  }
  // Columns [column, column + 16) as those of a right operand, k along rows [row, row + 16): a product with the tile as
  // it is. b[0], b[1] belong to the first eight columns, b[2], b[3] to the others.
  __device__ void load_right(uint32_t (&b)[4], int row, int column, int lane) const {
    load_matrices_transposed(b, address(row, column, lane & 15, lane >> 4));
  }

 private:
  // Of chunk(row + lane_row, column / 8 + lane_chunk), lane_chunk 0 or 1, in shared memory: an exclusive or of what
  // depends on the lane with what the compiler knows, so that few registers hold all addresses of a loop.
  __device__ uint32_t address(int row, int column, int lane_row, int lane_chunk) const {
    const uint32_t of_lane = shared_address(data) + lane_row * (2 * kColumns) + ((lane_chunk ^ (lane_row & 7)) << 4);
    return (of_lane ^ (column % 64 / kChunk << 4)) + row * (2 * kColumns) + column / 64 * 128;
  }
};

// A 16 x (8 kTiles) float32 result of one warp. Lane i holds rows i / 4 and i / 4 + 8, columns 2 (i % 4) and the next,
// of each tile of 8 columns: [0], [1] in the first row, [2], [3] in the second.
template <int kTiles>
using Accumulator = float[kTiles][4];

// Columns [16 step, 16 step + 16) of an accumulator as a left operand, rounded to Element.
template <typename Element, int kTiles>
__device__ inline void as_left(uint32_t (&a)[4], const float (&c)[kTiles][4], int step) {
  a[0] = pack<Element>(c[2 * step][0], c[2 * step][1]);
  a[1] = pack<Element>(c[2 * step][2], c[2 * step][3]);
  a[2] = pack<Element>(c[2 * step + 1][0], c[2 * step + 1][1]);
  a[3] = pack<Element>(c[2 * step + 1][2], c[2 * step + 1][3]);
}

template <int kTiles>
__device__ inline void clear(float (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      c[i][j] = 0.f;
    }
  }
}

// Sums and maxima over the four lanes that share an accumulator's row.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace nsa
