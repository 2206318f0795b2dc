// Rows: (query, head of a KV head's group) pairs, numbered query * G + head, so that any G fills a tile.
#pragma once

#include "common/sequences.cuh"

namespace nsa {

struct Row {
  int32_t query;  // within its sequence
  int32_t head;   // among all query heads
};

__device__ inline Row row_at(const SequenceLayout& s, int32_t head_kv, int32_t row) {
  const int32_t query = static_cast<int32_t>(s.by_group.divide(static_cast<uint32_t>(row)));
  return {query, head_kv * s.group + row - query * s.group};
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// A key with all of a row's probability: <dO, v> - <dO, out> is 0, but the two sums, taken in different order, only
// nearly so. Above this probability the gradient of the score is set to what is left of it: the gradient of lse.
template <typename Element>
constexpr float kWholeProbability = sizeof(Element) == 4 ? 1.f - 1.f / 4194304.f : 1.f - 1.f / 4096.f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

}  // namespace nsa
