// Where the keys of a branch lie, and how many a sequence has.
#pragma once

#include "common/sequences.cuh"

namespace nsa {

struct KeysPlace {
  int64_t begin;
  int32_t length;
};

__device__ inline KeysPlace keys_of(const SequencePlace& place, const Visibility& visibility, bool compressed) {
  if (compressed) {
    return {place.cmp_begin, visibility.end(place.k_length - 1)};
  }
  return {place.k_begin, place.k_length};
}

// The tile of keys of a slot: `num_keys` is a dense sequence's.
__device__ inline Tile find_keys(const SequenceLayout& s, bool compressed, int64_t num_keys, int64_t per_tile,
                                 int64_t slot) {
  return find_tile(s, compressed ? s.cumulative_cmp : s.cumulative_k, 1, num_keys, per_tile, slot);
}

}  // namespace nsa
