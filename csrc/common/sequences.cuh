// Which sequence, and which part of it, a block of threads works on.
//
// Sequences are cut into tiles of `per_tile` things (rows, keys, blocks). A packed sequence that starts at thing c has
// its first tile in slot floor(c / per_tile) + its own index: slots of different sequences never meet, some stay empty,
// and no table is needed, nor the longest length.
#pragma once

#include "common/params.h"

namespace nsa {

struct Tile {
  int32_t sequence;
  int32_t index;  // within the sequence; may lie past its end
};

// `scale`: things per entry of `cumulative` (the group, when rows are cut).
__device__ inline Tile find_tile(const SequenceLayout& s, const int32_t* cumulative, int64_t scale, int64_t length,
                                 int64_t per_tile, int64_t slot) {
  if (cumulative == nullptr) {
    const int64_t tiles = ceil_div(length, per_tile);
    return {static_cast<int32_t>(slot / tiles), static_cast<int32_t>(slot % tiles)};
  }
  const auto first_slot = [&](int64_t i) { return cumulative[i] * scale / per_tile + i; };
  int64_t low = 0;
  int64_t high = s.batch - 1;
  while (low < high) {  // the last sequence that starts at or before the slot
    const int64_t middle = (low + high + 1) / 2;
    if (first_slot(middle) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {static_cast<int32_t>(low), static_cast<int32_t>(slot - first_slot(low))};
}

// Which sequence query number `token` of the whole batch belongs to, and its place there.
__device__ inline Tile find_query(const SequenceLayout& s, int64_t token) {
  if (s.cumulative_q == nullptr) {
    return {static_cast<int32_t>(token / s.length_q), static_cast<int32_t>(token % s.length_q)};
  }
  int32_t low = 0;
  int32_t high = s.batch - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (s.cumulative_q[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, static_cast<int32_t>(token - s.cumulative_q[low])};
}

__device__ inline SequencePlace place_of(const SequenceLayout& s, int32_t sequence) {
  SequencePlace place{};
  if (!s.packed()) {
    place.batch = sequence;
    place.q_length = static_cast<int32_t>(s.length_q);
    place.k_length = static_cast<int32_t>(s.length_k);
  } else {
    place.q_begin = s.cumulative_q[sequence];
    place.q_length = static_cast<int32_t>(s.cumulative_q[sequence + 1] - place.q_begin);
    place.k_begin = s.cumulative_k[sequence];
    place.k_length =
        s.used_k != nullptr ? s.used_k[sequence] : static_cast<int32_t>(s.cumulative_k[sequence + 1] - place.k_begin);
    place.cmp_begin = s.cumulative_cmp != nullptr ? s.cumulative_cmp[sequence] : 0;
  }
  place.offset = place.k_length - place.q_length;
  return place;
}

}  // namespace nsa
