// From the probabilities of compressed blocks to lists, as ranking.cuh, by warps that do nothing else: each ranks the
// blocks of two queries at once, in 16 lanes each.
//
// A query's probabilities are in strips of kStripRing numbers in shared memory, block m of a
// walk at (base + m) % kStripRing, one for each
// of its slots of heads. Its list is kept there too, in descending order. Blocks that beat the list's last free place,
// whose score is the query's threshold, wait in a queue, and are merged with the list 16 at a time: the threshold may
// lag behind, but a merge costs as much for one block as for 16.
#pragma once

#include "selection/shape_sm90.cuh"

namespace nsa {

// 1 where a < b; neither below -2.
__device__ inline int is_less(int32_t a, int32_t b) { return static_cast<int>(static_cast<uint32_t>(a - b) >> 31); }

// Scores, which are 0 or more, or -1 in place of NaN, as integers of the same order. -2: none.
__device__ inline int32_t order_of(float score) { return max(__float_as_int(score), -1); }

// Of one list of 16 places in each half of the warp, and up to 16 later blocks, which come in ascending order; lanes
// that have none say so by `exists`. Each entry's new place is the number of those that go before it, counted without
// predicates, whose latency is long.
__device__ inline void merge(BlockList& list, bool exists, float score, int32_t block, int lane) {
  const int place = lane % 16;
  const float listed_score = list.scores[place];
  const int32_t listed_block = list.blocks[place];
  const int32_t listed = listed_block < 0 ? -2 : order_of(listed_score);
  const int32_t added = exists ? order_of(score) : -2;
  int to_listed = place;
  int to_added = 0;
#pragma unroll 8
  for (int from = 0; from < 16; ++from) {
    const int32_t other = __shfl_sync(kWholeWarp, added, from, 16);
    const int32_t other_listed = __shfl_sync(kWholeWarp, listed, from, 16);
    to_listed += is_less(listed, other);
    to_added += is_less(added, other + is_less(from, place));  // of two equal ones the earlier goes first
    to_added += is_less(added, other_listed + 1);
  }
  __syncwarp();
  if (to_listed < 16) {
    list.scores[to_listed] = listed_score;
    list.blocks[to_listed] = listed_block;
  }
  if (exists && to_added < 16) {
    list.scores[to_added] = score;
    list.blocks[to_added] = block;
  }
  __syncwarp();
}

// The lists that a warp keeps of a consumer's queries, which it takes in pairs.
template <int kStripRing>
class WarpLists {
 public:
  // `strips`, `queues` and `lists` are one consumer's, whose queries begin at this position; `queries` of them exist.
  // `base`: where this walk begins in the strips.
  __device__ WarpLists(const SelectSm90Params& params, const float* strips, CandidateQueue* queues, BlockList* lists,
                       int32_t first_position, int32_t queries, int32_t base, int lane)
      : params_(params),
        strips_(strips),
        queues_(queues),
        lists_(lists),
        first_position_(first_position),
        queries_(queries),
        base_(base),
        lane_(lane) {}

  __device__ void start() {
    for_each_pair([&](int query) {
      if (lane_ % 16 == 0) {
        queues_[query].threshold = query < queries_ && free_places(query) > 0 ? kMinusInfinity : kNone;
        queues_[query].count = 0;
      }
      lists_[query].scores[lane_ % 16] = kMinusInfinity;
      lists_[query].blocks[lane_ % 16] = -1;
    });
    __syncwarp();
  }

  // Ranks the blocks of step `number`, whose probabilities are in the strips.
  __device__ void rank(int32_t number) {
    const TileSteps& steps = params_.steps;
    const int32_t first = number * steps.blocks;
    if (steps.pieces_per_compressed == 2 && steps.pieces_per_selected == 4 && params_.parts == 1) {
      const bool all_free = first >= params_.initial && first + 16 <= own_block(0) - params_.local + 1;
#pragma unroll 1
      for (int query = lane_ / 16; query < params_.queries; query += 2 * kTogether) {
        rank_common(query, first + lane_ % 16, all_free);
      }
      return;
    }
    for (int32_t begin = 0; begin < steps.blocks; begin += 16) {
      if (begin > 0) {
        merge_full();
      }
      const int32_t block = first + begin + lane_ % 16;
      for_each_pair([&](int query) {
        const float score = importance(query, block);
        const bool candidate =
            score > queues_[query].threshold && begin + lane_ % 16 < steps.blocks && is_free(query, block);
        const unsigned candidates = __ballot_sync(kWholeWarp, candidate);
        if (candidates != 0) {
          enqueue(query, candidates, queues_[query].count, score, block);
        }
      });
    }
  }

  // Makes room in the queues for as many candidates as a step can have.
  __device__ void merge_full() {
    __syncwarp();
    const int32_t count = lane_ < params_.queries ? queues_[lane_].count : 0;
    for (unsigned full = __ballot_sync(kWholeWarp, count > kQueue - 16); full != 0;) {
      const int pair = (__ffs(static_cast<int>(full)) - 1) / 2;
      merge_queue(2 * pair + lane_ / 16);
      full &= ~(3u << (2 * pair));
    }
  }

  // Writes the lists. `list_of(query)` is where to.
  template <typename ListOf>
  __device__ void write(const ListOf& list_of) {
    merge_full();
    for_each_pair([&](int query) {
      merge_queue(query);
      write_list(query, query < queries_ ? list_of(query) : nullptr);
    });
  }

 private:
  static constexpr int kStripPitch = strip_pitch(kStripRing);
  static constexpr int kTogether = 4;  // pairs: every slot size makes a multiple of it, where all are in use
  static constexpr float kNone = -kMinusInfinity;  // a threshold that nothing passes

  // Calls with this half's query of each pair. It may be one too many, where their number is odd: it has a list, and no
  // candidates.
  template <typename Function>
  __device__ void for_each_pair(const Function& function) {
#pragma unroll 1
    for (int pair = 0; 2 * pair < params_.queries; ++pair) {
      function(2 * pair + lane_ / 16);
    }
  }
  __device__ const float* strip_of(int query, int part) const {
    return strips_ + (min(query, params_.queries - 1) * params_.parts + part) * kStripPitch;
  }
  __device__ int32_t own_block(int query) const { return own_block_of(params_, first_position_ + query); }
  __device__ int32_t free_places(int query) const {
    return params_.select.num_selected - min(params_.initial + params_.local, own_block(query) + 1);
  }

  // Weights 1, 2, 2, 2, 1; a step has 16 blocks. Takes kTogether pairs at once, to hide what each waits for.
  __device__ void rank_common(int first_query, int32_t block, bool all_free) {
    float scores[kTogether];
    bool candidate[kTogether];
    int32_t counts[kTogether];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int query = first_query + 2 * i;
      const float* const strip = strips_ + query * kStripPitch;
      const float4 inside = *reinterpret_cast<const float4*>(strip + ((base_ + 4 * block) & (kStripRing - 1)));
      const float last = strip[(base_ + 4 * block - 1) & (kStripRing - 1)];
      const float before = block == 0 ? 0.f : last;
      counts[i] = queues_[query].count;
      const float score = (before + inside.w) + 2.f * (inside.x + inside.y + inside.z);
      scores[i] = score == score ? score : -1.f;  // NaN counts as the lowest
      candidate[i] = scores[i] > queues_[query].threshold;
    }
    if (!all_free) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        candidate[i] = candidate[i] && is_free(first_query + 2 * i, block);
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
      const unsigned candidates = __ballot_sync(kWholeWarp, candidate[i]);
      if (candidates != 0) {
        enqueue(first_query + 2 * i, candidates, counts[i], scores[i], block);
      }
    }
  }

  __device__ float importance(int query, int32_t block) const {
    const TileSteps& steps = params_.steps;
    const int32_t first = block * steps.pieces_per_selected;
    const int32_t end = first + steps.pieces_per_selected;
    float importance = 0.f;
#pragma unroll 1
    for (int part = 0; part < params_.parts; ++part) {
      const float* const strip = strip_of(query, part);
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

  __device__ void enqueue(int query, unsigned candidates, int32_t count, float score, int32_t block) {
    CandidateQueue& queue = queues_[query];
    const unsigned of_half = candidates & 0xffffu << (lane_ & 16);
    if (candidates >> lane_ & 1) {
      const int place = count + __popc(of_half & ((1u << lane_) - 1));
      queue.scores[place] = score;
      queue.blocks[place] = block;
    }
    __syncwarp();
    if (lane_ % 16 == 0) {
      queue.count = count + __popc(of_half);
    }
  }

  // The first 16 of the queue leave it.
  __device__ void merge_queue(int query) {
    CandidateQueue& queue = queues_[query];
    const int place = lane_ % 16;
    const int32_t count = queue.count;
    const float score = queue.scores[place];
    const int32_t block = queue.blocks[place];
    const float next_score = queue.scores[16 + place];
    const int32_t next_block = queue.blocks[16 + place];
    merge(lists_[query], place < count, score, block, lane_);
    queue.scores[place] = next_score;
    queue.blocks[place] = next_block;
    if (place == 0) {
      queue.count = max(count - 16, 0);
      if (count > 0) {
        queue.threshold = lists_[query].scores[free_places(query) - 1];
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
  const int32_t first_position_;
  const int32_t queries_;
  const int32_t base_;
  const int lane_;
};

}  // namespace nsa
