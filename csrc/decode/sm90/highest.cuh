// The n highest of the ranks of selection blocks, by warps.
#pragma once

#include "decode/ranks.cuh"

namespace nsa {

// A block that may be chosen.
struct Candidate {
  uint32_t rank;  // 0: none
  int32_t block;
};

// Ranks in registers: number 32 i + lane; 0 beyond the last.
template <int kPerLane>
struct HeldRanks {
  uint32_t ranks[kPerLane];

  template <typename RankOf>
  __device__ HeldRanks(int32_t count, const RankOf& rank_of) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t at = 32 * i + this_lane();
      ranks[i] = at < count ? rank_of(at) : 0u;
    }
  }
  template <typename Function>
  __device__ void visit(const Function& function) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      function(32 * i, ranks[i]);
    }
  }
};

// Ranks where they are, any number.
template <typename RankOf>
struct DistantRanks {
  int32_t count;
  const RankOf& rank_of;

  template <typename Function>
  __device__ void visit(const Function& function) const {
#pragma unroll 8
    for (int32_t first = 0; first < count; first += 32) {
      const int32_t at = first + this_lane();
      function(first, at < count ? rank_of(at) : 0u);
    }
  }
};

template <typename Ranks>
__device__ inline int32_t count_from(const Ranks& ranks, uint32_t least) {
  int32_t count = 0;
  ranks.visit([&](int32_t, uint32_t rank) { count += rank >= least ? 1 : 0; });
  return __reduce_add_sync(0xffffffffu, count);
}

// Chosen are the ranks above `at`, and the first `ties` of those that equal it.
struct RankThreshold {
  uint32_t at;
  int32_t ties;
};

// Of the n highest ranks above 0; of all where there are fewer.
template <typename Ranks>
__device__ inline RankThreshold find_threshold(const Ranks& ranks, int32_t n) {
  int32_t forced = 0;
  int32_t present = 0;
  uint32_t highest = 0u;
  ranks.visit([&](int32_t, uint32_t rank) {
    forced += rank == kForcedRank ? 1 : 0;
    present += rank != 0u ? 1 : 0;
    highest = max(highest, rank == kForcedRank ? 0u : rank);
  });
  const int32_t counts = __reduce_add_sync(0xffffffffu, forced << 16 | present);
  if ((counts & 0xffff) <= n) {
    return {0u, 0};
  }
  if (counts >> 16 >= n) {
    return {kForcedRank, n};
  }
  uint32_t high = __reduce_max_sync(0xffffffffu, highest);
  // n ranks or more are as high as `low`: where n <= 32, each lane's highest is.
  uint32_t low = n <= 32 ? max(__reduce_min_sync(0xffffffffu, highest), 1u) : 1u;
#pragma unroll 1
  while (low < high) {
    const uint32_t middle = low + (high - low + 1u) / 2u;
    const int32_t count = count_from(ranks, middle);
    if (count == n) {
      return {middle - 1u, 0};
    }
    if (count > n) {
      low = middle;
    } else {
      high = middle - 1u;
    }
  }
  return {low, n - count_from(ranks, low + 1u)};
}

// Calls take(place among the chosen, number of the rank, rank) for each that is chosen, in ascending order of their numbers; returns
// how many there are.
template <typename Ranks, typename Take>
__device__ inline int32_t take_highest(const Ranks& ranks, int32_t n, const Take& take) {
  const RankThreshold threshold = find_threshold(ranks, n);
  const unsigned lower = (1u << this_lane()) - 1u;
  int32_t place = 0;
  int32_t ties = threshold.ties;
  ranks.visit([&](int32_t first, uint32_t rank) {
    const unsigned equals = __ballot_sync(0xffffffffu, rank == threshold.at);
    const bool taken = rank > threshold.at || (rank == threshold.at && __popc(equals & lower) < ties);
    const unsigned all = __ballot_sync(0xffffffffu, taken);
    if (taken) {
      take(place + __popc(all & lower), first + this_lane(), rank);
    }
    ties = max(ties - __popc(equals), 0);
    place += __popc(all);
  });
  return place;
}

// The same of `count` ranks, rank_of(number): few are held in registers.
template <typename RankOf, typename Take>
__device__ inline int32_t take_highest_of(int32_t count, const RankOf& rank_of, int32_t n, const Take& take) {
  if (count <= 128) {
    return take_highest(HeldRanks<4>(count, rank_of), n, take);
  }
  return take_highest(DistantRanks<RankOf>{count, rank_of}, n, take);
}

}  // namespace nsa
