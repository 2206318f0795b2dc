// A tile of keys of the gradients of k and v over a range, and the queries that see any of it.
#pragma once

#include "common/keys.cuh"
#include "range/params.h"

namespace nsa {

struct SeenKeys {
  SequencePlace place;
  int64_t begin;      // of the sequence's keys
  int32_t first_key;  // within the sequence
  int32_t count;      // keys that exist
  int32_t first_query;
  int32_t end_query;
};

template <int kKeys>
__device__ inline SeenKeys seen_keys(const RangeBackwardParams& params, int64_t slot) {
  const SequenceLayout& s = params.sequences;
  const Tile tile =
      find_tile(s, params.compressed ? s.cumulative_cmp : s.cumulative_k, 1, params.num_keys, kKeys, slot);
  SeenKeys result{};
  result.place = place_of(s, tile.sequence);
  KeysPlace keys = keys_of(result.place, params.visibility, params.compressed);
  if (!s.packed()) {
    keys.length = static_cast<int32_t>(params.num_keys);
  }
  result.begin = keys.begin;
  result.first_key = tile.index * kKeys;
  result.count = min(kKeys, keys.length - result.first_key);
  if (result.count <= 0) {
    result.count = 0;
    return result;
  }
  const int64_t offset = result.place.offset;
  const int64_t first = max_of(params.visibility.first_position(result.first_key) - offset, 0);
  const int64_t last =
      min_of(params.visibility.last_position(result.first_key + result.count - 1) - offset, result.place.q_length - 1);
  if (first <= last) {
    result.first_query = static_cast<int32_t>(first);
    result.end_query = static_cast<int32_t>(last + 1);
  }
  return result;
}

}  // namespace nsa
