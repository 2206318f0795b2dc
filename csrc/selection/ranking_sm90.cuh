// From the probabilities of compressed blocks to lists, as ranking.cuh, by warps that do nothing else: each ranks the
// blocks of two queries at once, in 16 lanes each.
//
// A query's probabilities are in strips of kStripRing numbers in shared memory, block m of a walk at
// (base + m) % kStripRing, one for each of its slots of heads. Its list is kept there too, in descending order. Blocks
// that beat the list's last free place, whose score is the query's threshold, wait in a queue, and are merged with the
// list 16 at a time: the threshold may lag behind, but a merge costs as much for one block as for 16. Thresholds and
// lengths of queues stay in registers: what ranking costs is latency, of one warp's instructions one after the other.
#pragma once

#include "selection/shape_sm90.cuh"

namespace nsa {

// 1 where a < b; neither below -2.
__device__ inline int is_less(int32_t a, int32_t b) { return static_cast<int>(static_cast<uint32_t>(a - b) >> 31); }

// Scores, which are 0 or more, or -1 in place of NaN, as integers of the same order. -2: none.
__device__ inline int32_t order_of(float score) { return max(__float_as_int(score), -1); }

// The lists that a warp keeps of queries of one consumer, which it takes in pairs. What a query's queue holds, and the
// score to beat, its lanes know.
template <typename Shape>
class WarpLists {
 public:
  // Query `first` of the consumer and the next are this warp's: it has `places` for them, and the first `queries`
  // exist, from this position on. `base`: where this walk begins in the strips.
  __device__ WarpLists(const SelectSm90Params& params, typename Shape::Shared& shared, int consumer, int first,
                       int32_t places, int32_t first_position, int32_t queries, int32_t base, int lane)
      : params_(params),
        strips_(shared.strips[consumer][first * params.parts]),
        queues_(shared.queues[consumer] + first),
        lists_(shared.lists[consumer] + first),
        places_(places),
        first_position_(first_position),
        queries_(queries),
        base_(base),
        lane_(lane) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int query = 2 * i + lane_ / 16;
      thresholds_[i] = query < queries_ && query < places_ && free_places(query) > 0 ? kMinusInfinity : kNone;
      counts_[i] = 0;
      if (2 * i < places_) {
        lists_[query].scores[lane_ % 16] = kMinusInfinity;
        lists_[query].blocks[lane_ % 16] = -1;
      }
    }
    __syncwarp();
  }

  // Ranks the blocks of step `number`, whose probabilities are in the strips.
  __device__ void rank(int32_t number) {
    const TileSteps& steps = params_.steps;
    const int32_t first = number * steps.blocks;
    if (steps.pieces_per_compressed == 2 && steps.pieces_per_selected == 4 && params_.parts == 1) {
      const bool all_free = first >= params_.initial && first + 15 <= own_block(0) - params_.local;
#pragma unroll
      for (int i = 0; i < kPairs; i += kTogether) {
        rank_common(i, first + lane_ % 16, all_free);
      }
      return;
    }
    for (int32_t begin = 0; begin < steps.blocks; begin += 16) {
      if (begin > 0) {
        merge_full();
      }
      const int32_t block = first + begin + lane_ % 16;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (2 * i < places_) {
          const int query = 2 * i + lane_ / 16;
          const float score = importance(query, block);
          enqueue(i, score > thresholds_[i] && begin + lane_ % 16 < steps.blocks && is_free(query, block), score,
                  block);
        }
      }
    }
  }

  // Makes room in the queues for as many candidates as a step can have.
  __device__ void merge_full() { merge_queues(kQueue - 16); }

  // Writes the lists. `list_of(query)` is where to.
  template <typename ListOf>
  __device__ void write(const ListOf& list_of) {
    merge_full();
    merge_queues(0);
#pragma unroll 1
    for (int query = lane_ / 16; query - lane_ / 16 < places_; query += 2) {
      write_list(query, query < places_ && query < queries_ ? list_of(query) : nullptr);
    }
  }

 private:
  static constexpr int kPairs = Shape::kPairs;
  static constexpr int kTogether = 2;  // pairs ranked at once, to hide what each waits for
  static constexpr int kStripRing = Shape::kStripRing;
  static constexpr int kStripPitch = Shape::kStripPitch;
  static constexpr float kNone = -kMinusInfinity;  // a threshold that nothing passes

  __device__ int32_t own_block(int query) const { return own_block_of(params_, first_position_ + query); }
  __device__ int32_t free_places(int query) const {
    return params_.select.num_selected - min(params_.initial + params_.local, own_block(query) + 1);
  }

  // Weights 1, 2, 2, 2, 1; a step has 16 blocks.
  __device__ void rank_common(int first_pair, int32_t block, bool all_free) {
    const int32_t at = (base_ + 4 * block) & (kStripRing - 1);
    const int32_t before_at = (at - 1) & (kStripRing - 1);
    const float* const strip = strips_ + lane_ / 16 * kStripPitch;
    float scores[kTogether];
    bool candidate[kTogether];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float* const of_pair = strip + 2 * (first_pair + i) * kStripPitch;
      const float4 inside = *reinterpret_cast<const float4*>(of_pair + at);
      const float last = of_pair[before_at];
      const float before = block == 0 ? 0.f : last;
      const float score = (before + inside.w) + 2.f * (inside.x + inside.y + inside.z);
      scores[i] = score == score ? score : -1.f;  // NaN counts as the lowest
      candidate[i] = scores[i] > thresholds_[first_pair + i];
    }
    if (!all_free) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        candidate[i] = candidate[i] && is_free(2 * (first_pair + i) + lane_ / 16, block);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      any = any || candidate[i];
    }
    if (!__any_sync(kWholeWarp, any)) {
      return;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      enqueue(first_pair + i, candidate[i], scores[i], block);
    }
  }

  __device__ float importance(int query, int32_t block) const {
    const TileSteps& steps = params_.steps;
    const int32_t first = block * steps.pieces_per_selected;
    const int32_t end = first + steps.pieces_per_selected;
    float importance = 0.f;
#pragma unroll 1
    for (int part = 0; part < params_.parts; ++part) {
      const float* const strip = strips_ + (min(query, places_ - 1) * params_.parts + part) * kStripPitch;
#pragma unroll 1
      for (int32_t m = max(first - steps.pieces_per_compressed + 1, 0); m < end; ++m) {
        const int32_t count = min(m + steps.pieces_per_compressed, end) - max(m, first);
        importance += strip[(base_ + m) & (kStripRing - 1)] * static_cast<float>(count);
      }
    }
    return importance == importance ? importance : -1.f;
  }

  __device__ bool is_free(int query, int32_t block) const {
    return block >= params_.initial && block <= own_block(query) - params_.local;
  }

  __device__ void enqueue(int pair, bool candidate, float score, int32_t block) {
    const unsigned of_half = __ballot_sync(kWholeWarp, candidate) & 0xffffu << (lane_ & 16);
    if (candidate) {
      CandidateQueue& queue = queues_[2 * pair + lane_ / 16];
      const int place = counts_[pair] + __popc(of_half & ((1u << lane_) - 1));
      queue.scores[place] = score;
      queue.blocks[place] = block;
    }
    counts_[pair] += __popc(of_half);
  }

  // Of all pairs whose queues hold more than so many: 16 of each queue move to the list.
  __device__ void merge_queues(int32_t more_than) {
    unsigned full = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      full |= counts_[i] > more_than ? 1u << i : 0u;
    }
    full = __reduce_or_sync(kWholeWarp, full);
    if (full == 0) {
      return;
    }
    __syncwarp();
#pragma unroll 1
    while (full != 0) {
      merge_first(full);
    }
  }

  // What is in a queue comes later than what is in the list, in ascending order. Each entry's new place is the number
  // of those that go before it, counted without predicates, whose latency is long.
  __device__ __forceinline__ void merge_first(unsigned& full) {
    const int place = lane_ % 16;
    const int pair = __ffs(static_cast<int>(full)) - 1;
    full &= full - 1;
    int32_t count = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      count = i == pair ? counts_[i] : count;
    }
    const int query = 2 * pair + lane_ / 16;
    const float score = queues_[query].scores[place];
    const int32_t block = queues_[query].blocks[place];
    const float listed_score = lists_[query].scores[place];
    const int32_t listed_block = lists_[query].blocks[place];
    const int32_t added = place < count ? order_of(score) : -2;
    const int32_t listed = listed_block < 0 ? -2 : order_of(listed_score);
    int to_added = 0;
    int to_listed = place;
#pragma unroll 8
    for (int from = 0; from < 16; ++from) {
      const int32_t earlier = is_less(from, place);  // of two equal ones the earlier goes first
      const int32_t other = __shfl_sync(kWholeWarp, added, from, 16);
      const int32_t other_listed = __shfl_sync(kWholeWarp, listed, from, 16);
      to_listed += is_less(listed, other);
      to_added += is_less(added, other + earlier);
      to_added += is_less(added, other_listed + 1);
    }
    __syncwarp();
    if (to_listed < 16) {
      lists_[query].scores[to_listed] = listed_score;
      lists_[query].blocks[to_listed] = listed_block;
    }
    if (place < count && to_added < 16) {
      lists_[query].scores[to_added] = score;
      lists_[query].blocks[to_added] = block;
    }
    if (count > 16) {
      queues_[query].scores[place] = queues_[query].scores[16 + place];
      queues_[query].blocks[place] = queues_[query].blocks[16 + place];
    }
    __syncwarp();
    const float threshold = count > 0 ? lists_[query].scores[free_places(query) - 1] : kNone;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i == pair) {
        thresholds_[i] = count > 0 ? threshold : thresholds_[i];
        counts_[i] = max(counts_[i] - 16, 0);
      }
    }
    __syncwarp();
  }

  // As write_list of ranking.cuh: one place of the list and one of the output in each lane of a half.
  __device__ void write_list(int query, int32_t* list) const {
    const int place = lane_ % 16;
    const int32_t own = own_block(query);
    const int32_t initial = min(params_.initial, own + 1);
    const int32_t local = min(params_.local, own + 1);
    const int32_t forced = min(params_.initial + params_.local, own + 1);
    const bool holds = place < params_.select.num_selected - forced && lists_[query].scores[place] > kMinusInfinity;
    const int32_t block = holds ? lists_[query].blocks[place] : 0x7fffffff;
    const int32_t count = forced + __popc(__ballot_sync(kWholeWarp, holds) & 0xffffu << (lane_ & 16));
    int32_t to = initial;
#pragma unroll
    for (int from = 0; from < 16; ++from) {
      to += is_less(__shfl_sync(kWholeWarp, block, from, 16), block);
    }
    if (list == nullptr) {
      return;
    }
    if (holds) {
      list[to] = block;
    }
    if (place < params_.select.num_selected) {
      if (place < initial) {
        list[place] = place;
      } else if (place >= count) {
        list[place] = -1;
      } else if (place >= count - local) {
        list[place] = own - (count - 1 - place);
      }
    }
  }

  const SelectSm90Params& params_;
  const float* const strips_;
  CandidateQueue* const queues_;
  BlockList* const lists_;
  const int32_t places_;
  const int32_t first_position_;
  const int32_t queries_;
  const int32_t base_;
  const int lane_;
  float thresholds_[kPairs];
  int32_t counts_[kPairs];
};

}  // namespace nsa
