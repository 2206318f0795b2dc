// How large the CPU kernels' tiles are: for the kernels, and for which_kernel, which knows no torch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace nsa::cpu {

constexpr int64_t kKeysPerChunk = 128;
constexpr int64_t kRowsPerTile = 256;
constexpr int64_t kRowsWanted = 128;  // that meet a listed block

inline int64_t tokens_per_tile(int64_t group) { return std::max<int64_t>(kRowsPerTile / group, 1); }

// Enough queries in a tile that a block of random choices meets about kRowsWanted rows, within what caches hold.
inline int64_t tokens_per_selected_tile(int64_t group, int64_t num_blocks, int64_t per_token) {
  const int64_t wanted = kRowsWanted * num_blocks / std::max<int64_t>(per_token * group, 1);
  const int64_t most = std::max<int64_t>(4096 / group, 1);
  return std::clamp<int64_t>(wanted, std::min<int64_t>(most, std::max<int64_t>(512 / group, 1)), most);
}

}  // namespace nsa::cpu
