// The choice itself, by one warp for one query: importance of blocks from the probabilities of their compressed keys, the most
// important so far, and at the end the list with the forced blocks among them.
#pragma once

#include "common/params.h"

namespace nsa {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMostSelected = 64;  // two entries per lane
constexpr float kNoBlock = -2.f;   // below every importance, NaN's included

// Importance is a number from 0 on; NaN ranks below all.
__device__ inline float ranked(float importance) { return importance == importance ? importance : -1.f; }

// Sum over compressed keys of probability times shared pieces (Eq. 9): the weights rise from 1 to the smaller of both counts
// and fall again. `first` is the probability of the first key that shares a piece with the block.
__device__ inline float block_importance(const float* first, int pieces_per_compressed, int pieces_per_selected) {
  const int keys = pieces_per_compressed + pieces_per_selected - 1;
  const int most = min(pieces_per_compressed, pieces_per_selected);
  float sum = 0.f;
  for (int i = 0; i < keys; ++i) {
    sum = fmaf(static_cast<float>(min(most, min(i + 1, keys - i))), first[i], sum);
  }
  return ranked(sum);
}

// Which blocks one query must read and may read.
struct Choice {
  int32_t own;      // the query's own block, the last that it may read; -1: none
  int32_t initial;  // blocks [0, initial) are forced,
  int32_t local;    // and [local, own]
  int32_t free;     // entries left for the most important

  __device__ Choice(const ForcedBlocks& forced, int32_t position, int32_t select_size, int32_t num_selected) {
    own = position < 0 ? -1 : position / select_size;
    initial = static_cast<int32_t>(min_of(forced.initial, own + 1));
    local = static_cast<int32_t>(max_of(own - forced.local + 1, initial));
    free = num_selected - initial - (own + 1 - local);
  }
  __device__ Choice() : own(-1), initial(0), local(0), free(0) {}
  __device__ bool candidate(int32_t block) const { return block >= initial && block < local; }
};

// Entries, best first: entry i is in lane i % 32, number i / 32.
struct BestBlocks {
  float importance[2];
  int32_t block[2];

  __device__ BestBlocks() {
    importance[0] = importance[1] = kNoBlock;
    block[0] = block[1] = -1;
  }

  // Entry `count` - 1: what is no better can't come in.
  __device__ float least(int count) const {
    return __shfl_sync(kAllLanes, count > 32 ? importance[1] : importance[0], (count - 1) & 31);
  }

  // Behind entries of the same importance, which are earlier blocks.
  __device__ void insert(float new_importance, int32_t new_block, int count, int lane) {
    const int rank = __popc(__ballot_sync(kAllLanes, importance[0] >= new_importance)) +
                     (count > 32 ? __popc(__ballot_sync(kAllLanes, importance[1] >= new_importance)) : 0);
    if (count > 32) {
      const float carried = __shfl_sync(kAllLanes, importance[0], 31);
      const int32_t carried_block = __shfl_sync(kAllLanes, block[0], 31);
      place(1, lane, lane + 32, rank, carried, carried_block, new_importance, new_block);
    }
    place(0, lane, lane, rank, 0.f, 0, new_importance, new_block);
  }

  // Takes in the candidates that the lanes hold, one each, in the order of lanes, which is that of blocks.
  __device__ void take(float candidate, int32_t candidate_block, int count, int lane) {
    unsigned better = __ballot_sync(kAllLanes, candidate > least(count));
    while (better != 0) {
      const int source = __ffs(static_cast<int>(better)) - 1;
      better &= better - 1;
      const float value = __shfl_sync(kAllLanes, candidate, source);
      const int32_t id = __shfl_sync(kAllLanes, candidate_block, source);
      if (value > least(count)) {
        insert(value, id, count, lane);
      }
    }
  }

 private:
  __device__ void place(int i, int lane, int position, int rank, float carried, int32_t carried_block,
                        float new_importance, int32_t new_block) {
    float before = __shfl_up_sync(kAllLanes, importance[i], 1);
    int32_t block_before = __shfl_up_sync(kAllLanes, block[i], 1);
    if (lane == 0) {
      before = carried;
      block_before = carried_block;
    }
    if (position > rank) {
      importance[i] = before;
      block[i] = block_before;
    } else if (position == rank) {
      importance[i] = new_importance;
      block[i] = new_block;
    }
  }
};

// Writes the list of one query, ascending, -1 last. `scratch`: kMostSelected numbers of this warp in shared memory.
__device__ inline void write_list(int32_t* list, int32_t num_selected, const Choice& choice, const BestBlocks& best,
                                  int32_t* scratch, int lane) {
  constexpr int32_t kNone = 0x7fffffff;
  const int forced_local = choice.own + 1 - choice.local;
  const int forced = choice.initial + forced_local;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int entry = lane + 32 * i;
    if (entry < forced) {
      scratch[entry] = entry < choice.initial ? entry : choice.local + entry - choice.initial;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int entry = lane + 32 * i;
    if (entry < choice.free) {
      scratch[forced + entry] = best.block[i] < 0 ? kNone : best.block[i];
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int entry = lane + 32 * i;
    if (entry < num_selected) {
      const int32_t own = scratch[entry];
      int rank = 0;
      for (int j = 0; j < num_selected; ++j) {
        rank += scratch[j] < own || (scratch[j] == own && j < entry) ? 1 : 0;
      }
      list[rank] = own == kNone ? -1 : own;
    }
  }
  __syncwarp();
}

}  // namespace nsa
