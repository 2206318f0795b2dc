// Numbers that order selection blocks.
#pragma once

#include "common/threads.cuh"
#include "decode/params.h"

namespace nsa {

constexpr uint32_t kForcedRank = 0xffffffffu;

// 0 for a block that can't be chosen, then free ones by importance, forced ones last.
__device__ inline uint32_t rank_of(const ForcedBlocks& forced, int32_t block, int32_t own_block, float importance) {
  if (block > own_block) {
    return 0u;
  }
  if (forced.contains(block, own_block)) {
    return kForcedRank;
  }
  return importance >= 0.f ? __float_as_uint(importance) + 2u : 1u;  // NaN counts as the lowest
}

}  // namespace nsa
