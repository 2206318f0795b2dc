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

}  // namespace nsa
