// The element type as well, for launches.
#pragma once

#include "common/dispatch.h"
#include "common/sm80/mma.cuh"

namespace nsa {

// Calls with an element, Half or BFloat16, and the dimensions of the tiles as compile-time constants.
template <typename Function>
void with_tiles(ElementType type, int32_t dim_k, int32_t dim_v, const Function& function) {
  with_tile_dims(dim_k, dim_v, [&](auto k, auto v) {
    if (type == ElementType::kFloat16) {
      function(Half(), k, v);
    } else {
      function(BFloat16(), k, v);
    }
  });
}

}  // namespace nsa
