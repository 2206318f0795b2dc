// Rows: (query, head of a KV head's group) pairs, numbered query * G + head, so that any G fills a tile.
#pragma once

#include "common/sequences.cuh"

namespace nsa {

struct Row {
  int32_t query;  // within its sequence
  int32_t head;   // among all query heads
};

__device__ inline Row row_at(const Sequences& s, int32_t head_kv, int32_t row) {
  const int32_t query = static_cast<int32_t>(s.by_group.divide(static_cast<uint32_t>(row)));
  return {query, head_kv * s.group + row - query * s.group};
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// A key with all of a row's probability: the gradient of its score is 0, but <dO, v> - delta, two sums in different
// order, is only nearly so: above this probability it is set to 0. Not where lse has a gradient, which passes to that
// score whole.
template <typename Element>
__device__ inline float whole_probability(bool lse_has_gradient) {
  return lse_has_gradient ? 2.f : sizeof(Element) == 4 ? 1.f - 1.f / 4194304.f : 1.f - 1.f / 4096.f;
}
constexpr float kMinusInfinity = -__builtin_huge_valf();

}  // namespace nsa
