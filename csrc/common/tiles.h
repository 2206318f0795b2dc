// What a block of threads works on at a time, and the shared memory it takes, for each kernel: <branch>/tiles.h, and
// here for kernels that branches share. Kernels are made of these numbers, plans give the same ones out.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace nsa {

struct KernelTile {
  int32_t rows = 0;           // or queries; 0: the kernel has no tiles
  int32_t keys = 0;           // that a step takes, or that the block of threads owns
  int32_t stages = 0;         // buffers of what passes by; 0: it has none
  int64_t dynamic_bytes = 0;  // of shared memory, that the launch asks for
  int64_t static_bytes = 0;   // that the kernel declares, up to where the rest begins

  constexpr int64_t shared_bytes() const { return dynamic_bytes + static_bytes; }
};

// Shared memory of a block of threads: on any GPU that kernels are built for, and on Hopper.
constexpr int64_t kLeastSharedBytes = int64_t{99} * 1024;
constexpr int64_t kHopperSharedBytes = int64_t{227} * 1024;

// Whether a tile states what a kernel for Hopper takes, and Hopper has it.
constexpr bool states_sm90(const KernelTile& tile, int64_t bytes) {
  return tile.dynamic_bytes == bytes && tile.shared_bytes() <= kHopperSharedBytes;
}

constexpr int64_t kHalfBytes = 2;  // of an element that tensor cores multiply
constexpr int64_t kFloatBytes = 4;
constexpr int64_t kBarrierBytes = 8;
constexpr int32_t kWarpgroupRows = 64;  // that a product of Hopper's takes

constexpr int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// The portable gradients of k and v (common/sm80/key_gradients.cuh).
namespace key_gradients_sm80 {

constexpr int32_t kRows = 32;       // of a stage
constexpr int32_t kRowNumbers = 3;  // lse, delta, gate of every row of a stage
constexpr int64_t kPlaceBytes = 8;  // where a row stands, of two tiles in turn
constexpr int64_t kStaticBytes = 128;
constexpr int32_t stages(int32_t tile_k) { return tile_k <= 192 ? 2 : 1; }
// Blocks of threads that share a tile whose gradients do not fit the registers together.
constexpr int32_t parts(int32_t tile_k) { return tile_k <= 128 ? 1 : tile_k <= 192 ? 2 : 4; }

constexpr KernelTile tile(TileDims dims) {
  const int32_t rows = stages(dims.k) * kRows;
  const int64_t tiles = kHalfBytes * (kKeysPerGradientTile + rows) * (dims.k + dims.v);
  return {.rows = kRows,
          .keys = kKeysPerGradientTile,
          .stages = stages(dims.k),
          .dynamic_bytes = tiles + kFloatBytes * rows * kRowNumbers + kPlaceBytes * 2 * kRows,
          .static_bytes = kStaticBytes};
}

}  // namespace key_gradients_sm80

// Attention in float32 (common/plain/): a warp for each row, or key, and a lane for each key, or row, that it meets.
namespace plain {

constexpr int32_t kWarps = 4;
constexpr int32_t kPitch = 33;  // of 32 staged columns
constexpr int64_t kStagingBytes = kFloatBytes * kWarps * 32 * kPitch;
constexpr int32_t kColumns[] = {64, 128, 256};

// The columns that hold both widths, of at most kLargestHeadDim.
constexpr int32_t columns(int32_t width_k, int32_t width_v) {
  const int32_t width = width_k > width_v ? width_k : width_v;
  return width <= kColumns[0] ? kColumns[0] : width <= kColumns[1] ? kColumns[1] : kColumns[2];
}

constexpr KernelTile forward_tile(int32_t columns) {
  return {.rows = kWarps, .keys = 32, .static_bytes = kStagingBytes + kFloatBytes * kWarps * columns};
}
constexpr KernelTile backward_query_tile(int32_t columns) {
  return {.rows = kWarps, .keys = 32, .static_bytes = kStagingBytes + kFloatBytes * 2 * kWarps * columns};
}
constexpr KernelTile backward_keys_tile(int32_t columns) {
  return {.rows = 32 * kWarps, .keys = 1, .static_bytes = kStagingBytes + kFloatBytes * 2 * columns};
}

}  // namespace plain

// A ring of rows of Hopper's gradients of k and v (common/sm90/key_gradients.cuh): Q, dO, four numbers of each row, and
// two barriers a stage.
constexpr int64_t row_ring_bytes(TileDims dims, int32_t rows, int32_t stages) {
  return round_up(stages * (kHalfBytes * rows * (dims.k + dims.v) + kFloatBytes * 4 * rows + 2 * kBarrierBytes), 1024);
}

}  // namespace nsa
