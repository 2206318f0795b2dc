// The gradient of q while many blocks of threads add to it: float32, in the order in which it lies in shared memory, so
// that one bulk copy adds the rows of a query.
//
// [KV heads][queries of the batch][panels of 32 columns][G rows][32 columns], and of a row's panel of 128 bytes the
// 16-byte chunk c is at place c ^ (row mod 8), where row = query * G + head of the group: threads that write a column of
// eight rows, or eight columns of a row, find different banks.
#pragma once

#include <cstdint>

namespace nsa {

struct QuerySums {
  float* data;      // nullptr: there is none
  int64_t queries;  // of the whole batch
  int32_t group;
  int32_t width;  // columns, a multiple of 32

  // The numbers of a query, group * width of them; those of the next query follow.
  __host__ __device__ int64_t query(int32_t head_kv, int64_t index) const {
    return (head_kv * queries + index) * group * width;
  }
  // Where in them a number lies. `index` counts through the batch, or from any multiple of 8 / gcd(8, group) queries.
  __host__ __device__ int32_t within(int64_t index, int32_t head, int32_t column) const {
    const int32_t row = static_cast<int32_t>(index * group + head) & 7;
    return ((column / 32) * group + head) * 32 + (((column & 31) / 4) ^ row) * 4 + (column & 3);
  }
};

}  // namespace nsa
