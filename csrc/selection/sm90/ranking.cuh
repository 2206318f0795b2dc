// From the probabilities of compressed blocks to lists, as ranking.cuh, by warps that do nothing else: each ranks the
// blocks of two queries at once, in 16 lanes each.
//
// A query's probabilities are in strips of kStripRing numbers in shared memory, block m of a walk at
// (base + m) % kStripRing, one for each of its slots of heads. Its list is kept there too, in descending order. Blocks
// that beat the list's last free place, whose score is the query's threshold, wait in a queue, and are merged with the
// list 16 at a time: the threshold may lag behind, but a merge costs as much for one block as for 16. Thresholds and
// lengths of queues stay in registers: what ranking costs is latency, of one warp's instructions one after the other.
#pragma once

#include "selection/sm90/shape.cuh"

namespace nsa {

// 1 where a < b; neither below -3.
__device__ inline int is_less(int32_t a, int32_t b) { return static_cast<int>(static_cast<uint32_t>(a - b) >> 31); }

// Scores, which are 0 or more, or -1 in place of NaN, as integers of the same order.
constexpr int32_t kNoScore = -2;
__device__ inline int32_t order_of(float score) { return max(__float_as_int(score), -1); }
__device__ inline float score_of(int32_t order) {
  return order >= 0 ? __int_as_float(order) : order == kNoScore ? kMinusInfinity : -1.f;
}

// How many scores of a list, which descend, are at least this one, in steps of four comparisons at once.
template <typename List>
__device__ inline int count_at_least(const List& list, int32_t score) {
  constexpr int kSteps = List::kLength == 16 ? 2 : 3;
  int at = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int span = List::kLength >> 2 * step;  // where the answer is: from `at` on
    const int part = span / 4 > 0 ? span / 4 : 1;
    const int parts = step == 0 ? 4 : span / part - 1;
    int count = 0;
#pragma unroll
    for (int i = 1; i <= parts; ++i) {
      count += is_less(score - 1, list.scores[at + i * part - 1]);
    }
    at += count * part;
  }
  return at;
}

// A bit for each place of the lists of a warp's two queries, the same in all lanes of a query.
template <int kLength>
struct PlaceMask {
  static constexpr int kWords = (kLength + 31) / 32;
  uint32_t words[kWords];

  // Of the places that the lanes of a query give; `valid`: this lane has one.
  __device__ PlaceMask(int place, bool valid, int lane) {
    if constexpr (kLength == 16) {
      words[0] = __reduce_or_sync(kWholeWarp, valid ? 1u << (place + (lane & 16)) : 0u) >> (lane & 16) & 0xffffu;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t own = valid && place / 32 == i ? 1u << place % 32 : 0u;
        const uint32_t first = __reduce_or_sync(kWholeWarp, lane < 16 ? own : 0u);
        const uint32_t second = __reduce_or_sync(kWholeWarp, lane < 16 ? 0u : own);
        words[i] = lane < 16 ? first : second;
      }
    }
  }
  // Of place 16 part + place.
  __device__ bool has(int part, int place) const { return (words[part / 2] >> (part % 2 * 16 + place) & 1) != 0; }
  __device__ int count_before(int part, int place) const {
    int count = __popc(words[part / 2] & ((1u << (part % 2 * 16 + place)) - 1));
#pragma unroll
    for (int i = 0; i < part / 2; ++i) {
      count += __popc(words[i]);
    }
    return count;
  }
};

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
#pragma unroll
        for (int j = 0; j < kPlaces; ++j) {
          lists_[query].scores[16 * j + lane_ % 16] = kNoScore;
        }
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
          // Probabilities of the next step's blocks are being written.
          const float score = begin + lane_ % 16 < steps.blocks ? importance(query, block) : -kNone;
          enqueue(i, score > thresholds_[i] && is_free(query, block), score, block);
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
  static constexpr int kPlaces = Shape::kListed / 16;  // of a list, of each lane
  static constexpr int kTogether = 2;                  // pairs ranked at once, to hide what each waits for
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
      scores[i] = fmaxf(score, -1.f);  // NaN counts as the lowest
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
      queue.scores[place] = order_of(score);
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

  // What is in a queue comes later than what is in the list, in ascending order. A candidate's new place is the number
  // of entries that go before it; what was in the list fills the places left, in its order.
  __device__ __forceinline__ void merge_first(unsigned& full) {
    const int lane = fresh_thread() % 32;  // nothing that depends on it is kept between merges
    const int place = lane % 16;
    const int pair = __ffs(static_cast<int>(full)) - 1;
    full &= full - 1;
    int32_t count = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      count = i == pair ? counts_[i] : count;
    }
    const int query = 2 * pair + lane / 16;
    CandidateQueue& queue = queues_[query];
    BlockList<Shape::kListed>& list = lists_[query];
    const int32_t score = place < count ? queue.scores[place] : kNoScore;
    const int32_t block = queue.blocks[place];
    int to = count_at_least(list, score);
    // Of two equal candidates the earlier goes first: the one whose lane lacks the highest bit that they differ in.
#pragma unroll
    for (int bit = 1; bit < 16; bit *= 2) {
      const int32_t less = score - ((place & bit) != 0 ? 1 : 0);
#pragma unroll
      for (int i = bit; i < 2 * bit; ++i) {
        to += is_less(less, __shfl_xor_sync(kWholeWarp, score, i));
      }
    }
    const bool enters = place < count && to < Shape::kListed;
    const PlaceMask<Shape::kListed> taken(to, enters, lane);
    int32_t listed_scores[kPlaces];
    int32_t listed_blocks[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int from = 16 * i + place - taken.count_before(i, place);
      listed_scores[i] = list.scores[from];
      listed_blocks[i] = list.blocks[from];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      if (!taken.has(i, place)) {
        list.scores[16 * i + place] = listed_scores[i];
        list.blocks[16 * i + place] = listed_blocks[i];
      }
    }
    if (enters) {
      list.scores[to] = score;
      list.blocks[to] = block;
    }
    queue.scores[place] = queue.scores[16 + place];
    queue.blocks[place] = queue.blocks[16 + place];
    __syncwarp();
    const float threshold = count > 0 ? score_of(list.scores[free_places(query) - 1]) : kNone;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i == pair) {
        thresholds_[i] = count > 0 ? threshold : thresholds_[i];
        counts_[i] = max(counts_[i] - 16, 0);
      }
    }
    __syncwarp();
  }

  // As write_list of ranking.cuh: of each 16 places of the list and of the output, one in each lane of a half.
  __device__ void write_list(int query, int32_t* list) const {
    const int lane = fresh_thread() % 32;
    const int place = lane % 16;
    const int32_t own = own_block(query);
    const int32_t initial = min(params_.initial, own + 1);
    const int32_t local = min(params_.local, own + 1);
    const int32_t forced = min(params_.initial + params_.local, own + 1);
    int32_t blocks[kPlaces];  // 0x7fffffff: none
    int to[kPlaces];
    int32_t count = forced;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int at = 16 * i + place;
      const bool holds = at < params_.select.num_selected - forced && lists_[query].scores[at] != kNoScore;
      blocks[i] = holds ? lists_[query].blocks[at] : 0x7fffffff;
      count += __popc(__ballot_sync(kWholeWarp, holds) & 0xffffu << (lane & 16));
      to[i] = initial;
    }
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
#pragma unroll(kPlaces == 1 ? 16 : 4)
      for (int from = 0; from < 16; ++from) {
        const int32_t other = __shfl_sync(kWholeWarp, blocks[i], from, 16);
#pragma unroll
        for (int j = 0; j < kPlaces; ++j) {
          to[j] += is_less(other, blocks[j]);
        }
      }
    }
    if (list == nullptr) {
      return;
    }
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int at = 16 * i + place;
      if (blocks[i] != 0x7fffffff) {
        list[to[i]] = blocks[i];
      }
      if (at < params_.select.num_selected) {
        if (at < initial) {
          list[at] = at;
        } else if (at >= count) {
          list[at] = -1;
        } else if (at >= count - local) {
          list[at] = own - (count - 1 - at);
        }
      }
    }
  }

  const SelectSm90Params& params_;
  const float* const strips_;
  CandidateQueue* const queues_;
  BlockList<Shape::kListed>* const lists_;
  const int32_t places_;
  const int32_t first_position_;
  const int32_t queries_;
  const int32_t base_;
  const int lane_;
  float thresholds_[kPairs];
  int32_t counts_[kPairs];
};

}  // namespace nsa
