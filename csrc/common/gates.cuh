// Gates of the branches: how they are read, and 16 bytes of the sum that they weigh.
#pragma once

#include "common/params.h"
#include "common/sm80/mma.cuh"

namespace nsa {

__device__ inline float load_gate(const GatesView& gates, int64_t batch, int64_t token, int64_t head, int branch) {
  const int64_t offset = gates.offset(batch, token, head, branch);
  switch (gates.type) {
    case ElementType::kFloat16:
      return to_float(static_cast<const Half*>(gates.data)[offset]);
    case ElementType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(gates.data)[offset]);
    default:
      return static_cast<const float*>(gates.data)[offset];
  }
}

// Those of all three branches.
__device__ inline void load_gates(float (&to)[3], const GatesView& gates, int64_t batch, int64_t token, int64_t head) {
  const int64_t offset = gates.offset(batch, token, head, 0);
  const auto load_all = [&]<typename Element>(const Element* from) {
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      to[b] = to_float(from[offset + b * gates.branch_stride]);
    }
  };
  switch (gates.type) {
    case ElementType::kFloat16:
      return load_all(static_cast<const Half*>(gates.data));
    case ElementType::kBFloat16:
      return load_all(static_cast<const BFloat16*>(gates.data));
    default:
      return load_all(static_cast<const float*>(gates.data));
  }
}

// gates[0] x + gates[1] y + gates[2] z of two 16-bit elements, in float32, rounded.
template <typename Element>
__device__ inline uint32_t gated_pair(const float (&gates)[3], uint32_t x, uint32_t y, uint32_t z) {
  const uint32_t words[3] = {x, y, z};
  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    const Element* const pair = reinterpret_cast<const Element*>(&words[b]);
    sums[0] = fmaf(gates[b], to_float(pair[0]), sums[0]);
    sums[1] = fmaf(gates[b], to_float(pair[1]), sums[1]);
  }
  return pack<Element>(sums[0], sums[1]);
}
// Of eight.
template <typename Element>
__device__ inline uint4 gated_chunk(const float (&gates)[3], const uint4& x, const uint4& y, const uint4& z) {
  return {gated_pair<Element>(gates, x.x, y.x, z.x), gated_pair<Element>(gates, x.y, y.y, z.y),
          gated_pair<Element>(gates, x.z, y.z, z.z), gated_pair<Element>(gates, x.w, y.w, z.w)};
}

}  // namespace nsa
