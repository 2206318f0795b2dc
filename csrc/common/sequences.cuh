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

// The last sequence that starts at or before a slot: first_slot(i) says where sequence i starts.
template <typename Index, typename Slot, typename FirstSlot>
__device__ inline Index last_sequence_before(Index sequences, Slot slot, const FirstSlot& first_slot) {
  Index low = 0;
  Index high = sequences - 1;
#pragma unroll 1
  while (low < high) {
    const Index middle = (low + high + 1) / 2;
    if (first_slot(middle) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// `scale`: things per entry of `cumulative` (the group, when rows are cut).
__device__ inline Tile find_tile(const SequenceLayout& s, const int32_t* cumulative, int64_t scale, int64_t length,
                                 int64_t per_tile, int64_t slot) {
  if (cumulative == nullptr) {
    const int64_t tiles = ceil_div(length, per_tile);
    return {static_cast<int32_t>(slot / tiles), static_cast<int32_t>(slot % tiles)};
  }
  const auto first_slot = [&](int64_t i) { return cumulative[i] * scale / per_tile + i; };
  const int64_t sequence = last_sequence_before<int64_t>(s.batch, slot, first_slot);
  return {static_cast<int32_t>(sequence), static_cast<int32_t>(slot - first_slot(sequence))};
}

// The same in 32 bits, by divisors known on the host: by the tiles of a dense sequence, and by the things of a tile.
__device__ inline Tile find_tile(const SequenceLayout& s, const int32_t* cumulative, int32_t scale,
                                 const Divisor& by_tiles, const Divisor& by_things, int32_t slot) {
  if (cumulative == nullptr) {
    const auto sequence = static_cast<int32_t>(by_tiles.divide(static_cast<uint32_t>(slot)));
    return {sequence, slot - sequence * static_cast<int32_t>(by_tiles.divisor)};
  }
  const auto first_slot = [&](int32_t i) {
    return static_cast<int32_t>(by_things.divide(static_cast<uint32_t>(cumulative[i] * scale))) + i;
  };
  const int32_t sequence = last_sequence_before<int32_t>(s.batch, slot, first_slot);
  return {sequence, slot - first_slot(sequence)};
}

// Which sequence query number `token` of the whole batch belongs to, and its place there.
__device__ inline Tile find_query(const SequenceLayout& s, int64_t token) {
  if (s.cumulative_q == nullptr) {
    return {static_cast<int32_t>(token / s.length_q), static_cast<int32_t>(token % s.length_q)};
  }
  const auto first_token = [&](int32_t i) { return s.cumulative_q[i]; };
  const int32_t sequence = last_sequence_before<int32_t>(s.batch, token, first_token);
  return {sequence, static_cast<int32_t>(token - first_token(sequence))};
}

__device__ inline SequencePlace place_of(const SequenceLayout& s, int32_t sequence) {
  SequencePlace place{};
  if (!s.packed()) {
    place.batch = sequence;
    place.q_length = static_cast<int32_t>(s.length_q);
    place.k_length = static_cast<int32_t>(s.length_k);
    place.offset = s.offset;
  } else {
    place.q_begin = s.cumulative_q[sequence];
    place.q_length = static_cast<int32_t>(s.cumulative_q[sequence + 1] - place.q_begin);
    place.k_begin = s.cumulative_k[sequence];
    place.k_length =
        s.used_k != nullptr ? s.used_k[sequence] : static_cast<int32_t>(s.cumulative_k[sequence + 1] - place.k_begin);
    place.cmp_begin = s.cumulative_cmp != nullptr ? s.cumulative_cmp[sequence] : 0;
    place.offset = default_offset(place.q_length, place.k_length);
  }
  return place;
}

}  // namespace nsa
