// The machine and the element type as well, for launches.
#pragma once

#include "common/dispatch.h"
#include "common/plan.h"
#include "common/sm80/mma.cuh"

namespace nsa {

// Calls with the machine, sm80 or sm90, an element, Half or BFloat16, and the dimensions of the tiles as compile-time
// constants. A machine is asked only for what it has.
template <typename Function>
void with_kernel(Machine machine, ElementType type, int32_t dim_k, int32_t dim_v, const Function& function) {
  const auto with_element = [&](auto element, auto k, auto v) {
    if constexpr (has_sm90_kernels(k)) {
      if (machine == Machine::kSm90) {
        return function(std::integral_constant<Machine, Machine::kSm90>(), element, k, v);
      }
    }
    function(std::integral_constant<Machine, Machine::kSm80>(), element, k, v);
  };
  with_tile_dims(dim_k, dim_v, [&](auto k, auto v) {
    if (type == ElementType::kFloat16) {
      with_element(Half(), k, v);
    } else {
      with_element(BFloat16(), k, v);
    }
  });
}

}  // namespace nsa
