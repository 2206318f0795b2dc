// From run-time options to compile-time ones. What the tensor-core kernels are built for is listed here and nowhere
// else; tests/test_source_rules.py holds the files in instantiations/ to it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/params.h"

namespace nsa {

constexpr int32_t kLargestHeadDim = 256;

// Dimensions of the tiles that hold a head's keys and values.
struct TileDims {
  int32_t k;
  int32_t v;
};
constexpr TileDims kTileDims[] = {{64, 64}, {128, 128}, {192, 128}, {256, 256}};
// Hopper's kernels have all but the last.
constexpr bool has_sm90_kernels(int32_t tile_k) { return tile_k <= 192; }

// The smallest tiles that hold heads of these widths, both at most kLargestHeadDim.
constexpr TileDims tile_dims(int32_t dim_k, int32_t dim_v) {
  for (const TileDims& dims : kTileDims) {
    if (dim_k <= dims.k && dim_v <= dims.v) {
      return dims;
    }
  }
  return {kLargestHeadDim, kLargestHeadDim};
}

// Calls with the number of their tiles in kTileDims as a compile-time constant.
template <typename Function>
void with_tile_dims(int32_t dim_k, int32_t dim_v, const Function& function) {
  const TileDims dims = tile_dims(dim_k, dim_v);
  const auto try_one = [&](auto i) {
    constexpr TileDims kDims = kTileDims[i];
    if (dims.k == kDims.k && dims.v == kDims.v) {
      function(std::integral_constant<int, kDims.k>(), std::integral_constant<int, kDims.v>());
    }
  };
  try_one(std::integral_constant<int, 0>());
  try_one(std::integral_constant<int, 1>());
  try_one(std::integral_constant<int, 2>());
  try_one(std::integral_constant<int, 3>());
  static_assert(sizeof(kTileDims) / sizeof(TileDims) == 4);
}

// The sum of both dimensions of those tiles: what a row of a partial sum holds.
constexpr int64_t tile_row_size(int32_t dim_k, int32_t dim_v) {
  const TileDims dims = tile_dims(dim_k, dim_v);
  return int64_t{dims.k} + dims.v;
}

// Keys of a tile whose gradients are summed together.
constexpr int64_t kKeysPerGradientTile = 64;

}  // namespace nsa
