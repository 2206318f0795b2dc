// What a thread of a kernel of compress works on: its items, and the few columns of each, as float32 numbers.
#pragma once

#include "common/sm80/mma.cuh"
#include "compression/params.h"

namespace nsa {

struct Item {
  uint32_t token;  // of the row's
  int64_t head;
  int64_t column;
};

template <int kWidth>
__device__ inline Item item_at(const RowItems& items, uint32_t number) {
  const uint32_t token = items.by_token.divide(number);
  const uint32_t rest = number - token * items.per_token;
  const uint32_t head = items.by_columns.divide(rest);
  return {token, head, int64_t{rest - head * items.by_columns.divisor} * kWidth};
}

template <typename Element, int kWidth>
struct alignas(sizeof(Element) * kWidth) ElementPack {
  Element elements[kWidth];
};

template <int kWidth, typename Element>
__device__ inline void add_columns(float (&sum)[kWidth], const Element* from) {
  const auto pack = *reinterpret_cast<const ElementPack<Element, kWidth>*>(from);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    sum[i] += to_float(pack.elements[i]);
  }
}

template <int kWidth, typename Element>
__device__ inline void store_columns(Element* to, const float (&values)[kWidth]) {
  ElementPack<Element, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    pack.elements[i] = from_float<Element>(values[i]);
  }
  *reinterpret_cast<ElementPack<Element, kWidth>*>(to) = pack;
}

}  // namespace nsa
