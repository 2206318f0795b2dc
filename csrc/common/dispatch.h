// From run-time options to compile-time ones. What the tensor-core kernels are built for is listed here and nowhere
// else.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/params.h"

namespace nsa {

constexpr int32_t kLargestHeadDim = 256;

// Calls with the (Dk, Dv) of the smallest tiles that hold heads of these widths, both at most kLargestHeadDim.
template <typename Function>
void with_tile_dims(int32_t dim_k, int32_t dim_v, const Function& function) {
  if (dim_k <= 64 && dim_v <= 64) {
    function(std::integral_constant<int, 64>(), std::integral_constant<int, 64>());
  } else if (dim_k <= 128 && dim_v <= 128) {
    function(std::integral_constant<int, 128>(), std::integral_constant<int, 128>());
  } else if (dim_k <= 192 && dim_v <= 128) {
    function(std::integral_constant<int, 192>(), std::integral_constant<int, 128>());
  } else {
    function(std::integral_constant<int, 256>(), std::integral_constant<int, 256>());
  }
}

// The sum of both dimensions of those tiles: what a row of a partial sum holds.
inline int64_t tile_row_size(int32_t dim_k, int32_t dim_v) {
  int64_t size = 0;
  with_tile_dims(dim_k, dim_v, [&](auto k, auto v) { size = k + v; });
  return size;
}

// Keys of a tile whose gradients are summed together.
constexpr int64_t kKeysPerGradientTile = 64;

}  // namespace nsa
