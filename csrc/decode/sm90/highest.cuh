// The n highest of the ranks of selection blocks, by one warp.
#pragma once

#include "decode/ranks.cuh"

namespace nsa {

// Chosen are the ranks above `at`, and the first `ties` of those that equal it.
struct RankThreshold {
  uint32_t at;
  int32_t ties;
};

// Ranks in registers: number 32 i + lane; 0 beyond the last.
template <int kPerLane>
struct HeldRanks {
  uint32_t ranks[kPerLane];

  __device__ HeldRanks(const uint32_t* from, int32_t count) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t at = 32 * i + this_lane();
      ranks[i] = at < count ? from[at] : 0u;
    }
  }
  __device__ int32_t count_from(uint32_t least) const {
    int32_t count = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      count += ranks[i] >= least ? 1 : 0;
    }
    return __reduce_add_sync(0xffffffffu, count);
  }
  __device__ uint32_t highest_free() const {
    uint32_t highest = 0u;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      highest = max(highest, ranks[i] == kForcedRank ? 0u : ranks[i]);
    }
    return __reduce_max_sync(0xffffffffu, highest);
  }
};

// Ranks in shared memory, any number.
struct SharedRanks {
  const uint32_t* ranks;
  int32_t count;

  __device__ int32_t count_from(uint32_t least) const {
    int32_t sum = 0;
#pragma unroll 8
    for (int32_t i = this_lane(); i < count; i += 32) {
      sum += ranks[i] >= least ? 1 : 0;
    }
    return __reduce_add_sync(0xffffffffu, sum);
  }
  __device__ uint32_t highest_free() const {
    uint32_t highest = 0u;
#pragma unroll 8
    for (int32_t i = this_lane(); i < count; i += 32) {
      highest = max(highest, ranks[i] == kForcedRank ? 0u : ranks[i]);
    }
    return __reduce_max_sync(0xffffffffu, highest);
  }
};

// Ranks are above 0, and there are n of them or more.
template <typename Ranks>
__device__ inline RankThreshold find_threshold(const Ranks& ranks, int32_t n) {
  if (ranks.count_from(kForcedRank) >= n) {
    return {kForcedRank, n};
  }
  uint32_t low = 1u;  // n ranks or more are as high
  uint32_t high = ranks.highest_free();
#pragma unroll 1
  while (low < high) {
    const uint32_t middle = low + (high - low + 1u) / 2u;
    const int32_t count = ranks.count_from(middle);
    if (count == n) {
      return {middle - 1u, 0};
    }
    if (count > n) {
      low = middle;
    } else {
      high = middle - 1u;
    }
  }
  return {low, n - ranks.count_from(low + 1u)};
}

// The chosen blocks in ascending order.
__device__ inline void write_chosen(const RankThreshold& threshold, const uint32_t* ranks, int32_t count, int32_t n,
                                    int32_t* list) {
  int32_t place = 0;
  int32_t ties = threshold.ties;
#pragma unroll 2
  for (int32_t first = 0; first < count; first += 32) {
    const int32_t i = first + this_lane();
    const uint32_t rank = i < count ? ranks[i] : 0u;
    const unsigned aboves = __ballot_sync(0xffffffffu, rank > threshold.at);
    const unsigned equals = __ballot_sync(0xffffffffu, i < count && rank == threshold.at);
    const unsigned lower = (1u << this_lane()) - 1u;
    const bool tied = (equals >> this_lane() & 1u) != 0u && __popc(equals & lower) < ties;
    const unsigned taken = aboves | __ballot_sync(0xffffffffu, tied);
    if ((taken >> this_lane() & 1u) != 0u) {
      list[place + __popc(taken & lower)] = i;
    }
    ties -= min(__popc(equals), ties);
    place += __popc(taken);
  }
}

}  // namespace nsa
