// The n highest of selection blocks' ranks, by a warp.
#pragma once

#include "decode/ranks.cuh"

namespace nsa {

// A block that may be chosen.
struct Candidate {
  uint32_t rank;  // 0: none
  int32_t block;
};

// Candidates that a warp goes through, 128 at a time: the first of them stay in registers.
struct CandidateRanks {
  const Candidate* from;
  int32_t count;
  uint32_t held[4];

  __device__ CandidateRanks(const Candidate* from_, int32_t count_) : from(from_), count(count_) { load(0, held); }

  // Calls function(number of the lane's rank, rank) for all, with 0 beyond the last.
  template <typename Function>
  __device__ void visit(const Function& function) const {
    uint32_t ranks[4] = {held[0], held[1], held[2], held[3]};
#pragma unroll 1
    for (int32_t first = 0;;) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        function(first + 32 * i + this_lane(), ranks[i]);
      }
      first += 128;
      if (first >= count) {
        return;
      }
      load(first, ranks);
    }
  }
  __device__ int32_t count_from(uint32_t least) const {
    int32_t sum = 0;
    visit([&](int32_t, uint32_t rank) { sum += rank >= least ? 1 : 0; });
    return __reduce_add_sync(0xffffffffu, sum);
  }

 private:
  __device__ void load(int32_t first, uint32_t (&ranks)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t at = first + 32 * i + this_lane();
      ranks[i] = at < count ? from[at].rank : 0u;
    }
  }
};

// Chosen are the ranks above `at`, and the first `ties` of those that equal it.
struct RankThreshold {
  uint32_t at;
  int32_t ties;
};

// Of the n highest ranks above 0; of all where there are fewer.
__device__ inline RankThreshold find_threshold(const CandidateRanks& ranks, int32_t n) {
  int32_t forced = 0;
  int32_t present = 0;
  uint32_t highest = 0u;
  ranks.visit([&](int32_t, uint32_t rank) {
    forced += rank == kForcedRank ? 1 : 0;
    present += rank != 0u ? 1 : 0;
    highest = max(highest, rank == kForcedRank ? 0u : rank);
  });
  if (__reduce_add_sync(0xffffffffu, present) <= n) {
    return {0u, 0};
  }
  if (__reduce_add_sync(0xffffffffu, forced) >= n) {
    return {kForcedRank, n};
  }
  uint32_t high = __reduce_max_sync(0xffffffffu, highest);
  // n ranks or more are as high as `low`: where n <= 32, each lane's highest is.
  uint32_t low = n <= 32 ? max(__reduce_min_sync(0xffffffffu, highest), 1u) : 1u;
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

// Copies the n highest of `count` candidates, in their order, and returns how many there were.
static __device__ __noinline__ int32_t take_highest(const Candidate* from, int32_t count, int32_t n, Candidate* to) {
  const CandidateRanks ranks(from, count);
  const RankThreshold threshold = find_threshold(ranks, n);
  const unsigned lower = (1u << this_lane()) - 1u;
  int32_t place = 0;
  int32_t ties = threshold.ties;
  ranks.visit([&](int32_t number, uint32_t rank) {
    const unsigned equals = __ballot_sync(0xffffffffu, rank == threshold.at);
    const bool taken = rank > threshold.at || (rank == threshold.at && __popc(equals & lower) < ties);
    const unsigned all = __ballot_sync(0xffffffffu, taken);
    if (taken) {
      to[place + __popc(all & lower)] = from[number];
    }
    ties = max(ties - __popc(equals), 0);
    place += __popc(all);
  });
  __syncwarp();
  return place;
}

}  // namespace nsa
