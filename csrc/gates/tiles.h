// Tiles of the kernels of gates and deltas, and their shared memory.
#pragma once

#include "common/tiles.h"

namespace nsa::gate_tiles {

constexpr uint32_t kRows = 64;  // of a block of threads, at most
constexpr int32_t kBranches = 3;

constexpr KernelTile kCombine{.rows = kRows};
constexpr KernelTile kGradients{.rows = kRows, .static_bytes = int64_t{2} * kBranches * kRows * 4};  // products, gates
constexpr KernelTile kDelta{.rows = kRows, .static_bytes = int64_t{kRows} * 4};

}  // namespace nsa::gate_tiles
