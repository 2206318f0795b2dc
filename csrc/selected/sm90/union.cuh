// Tiles of consecutive tokens and the union of their lists of blocks, for Hopper's selected attention.
#pragma once

#include "common/rows.cuh"
#include "common/sm90/block.cuh"
#include "selected/params.h"

namespace nsa {

// kGroups warpgroups own 64 rows each: the heads of four tokens, of eight where a group has at most eight heads, or of
// sixteen where it has at most four. kGradients: rows have a gradient of the output beside Q. kWide: tiles may have
// more than 12 tokens. Up to kMostAlone warps of a warpgroup take a block by themselves, by mma.sync; more take it
// together, by wgmma. kHeadSlots: rows of a token, 16, 8 or 4; 0 where the launch says whether 16 or 8.
template <typename Element_, int kDimK_, int kDimV_, bool kGradients_, int kGroups_, int kStagesK_, int kStagesV_,
          bool kWide_, int kMostAlone_, int kHeadSlots_ = kWide_ ? 0 : 16>
struct UnionShape : ConsumersShape<Element_, kDimK_, kDimV_, kGroups_, 64> {
  static constexpr bool kGradients = kGradients_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kStagesK = kStagesK_;
  static constexpr int kStagesV = kStagesV_;
  static constexpr bool kWide = kWide_;
  static constexpr int kMostAlone = kMostAlone_;
  static constexpr int kHeadSlots = kHeadSlots_;
  static constexpr int kRows = 64;            // of a group: as many as keys of a block, so that Q has a KTile too
  static constexpr int kWarps = 4 * kGroups;  // consumers
  static constexpr bool kOnlyKeys = false;    // whether steps have no V, and tiles no rows
  static constexpr int kBytesK = kRows * kDimK_ * 2;  // of a block
  static constexpr int kBytesV = kRows * kDimV_ * 2;
  static constexpr int kRingBytes = kStagesK * kBytesK + kStagesV * kBytesV;
  static constexpr bool kQInRegisters = kDimK_ <= 128;  // elsewhere there are too few
  static constexpr int kGroupBytes = kQInRegisters ? 0 : kBytesK;
  // A block, how many warps do not take it (4 bits), and a bit for each of the tile's tokens.
  using Step = std::conditional_t<kWide || kGroups == 4, uint64_t, uint32_t>;
  static constexpr int kTokenBits = kHeadSlots == 4 ? 52 : sizeof(Step) == 8 ? 36 : 16;
  static constexpr int kAbsentBit = kTokenBits - 4;
  static constexpr int32_t kMostBlocks = kHeadSlots == 4 ? 1 << 12 : 1 << 16;

  struct Barriers {
    // Filled by the copies of a step, watched by the warps that need it, and drained by those; a producer arrives for
    // the others.
    Barrier k_full[kStagesK], k_empty[kStagesK];
    Barrier v_full[kStagesV], v_empty[kStagesV];
    Barrier list_full[2];   // written by the merging warp
    Barrier list_empty[2];  // read by the consumers and the producers
    // Of K and of V: steps that a buffer is free for, or was. Before, `full` may be two phases behind.
    uint32_t issued[2];
    int32_t steps[2];                                  // of each list
    uint32_t turns[kWarps];                            // tiles that each consumer warp has done
    float grad_lse[kGradients ? kGroups * kRows : 1];  // of each row, over its gate
  };
};

struct UnionParams {
  SequenceLayout sequences;
  const int32_t* block_indices;
  int32_t num_selected;
  int32_t head_slots;  // rows of a token
  int32_t tiles;       // slots of tokens, times Hkv, times tiles of `head_slots` heads
  int32_t first_tile;  // those of the heads that are worked on
  int32_t end_tile;
  CUtensorMap k, v;  // boxes of 64 columns, 64 tokens
  CUtensorMap q;     // boxes of 64 columns, `head_slots` heads, 64 / head_slots tokens
  CUtensorMap grad_out;
};

// Rows of a token, and tokens of a warpgroup.
template <typename Shape>
NSA_HOST_DEVICE inline int head_slots_of(const UnionParams& u) {
  return Shape::kHeadSlots == 0 ? u.head_slots : Shape::kHeadSlots;
}
template <typename Shape>
NSA_HOST_DEVICE inline int group_tokens_of(const UnionParams& u) {
  return Shape::kRows / head_slots_of<Shape>(u);
}

template <typename Shape>
constexpr int64_t union_shared_bytes(int64_t tokens, int32_t num_selected) {
  return Shape::kRingBytes + Shape::kGroups * Shape::kGroupBytes + sizeof(typename Shape::Barriers) +
         tokens * num_selected * static_cast<int64_t>(2 * sizeof(typename Shape::Step) + sizeof(uint32_t));
}

// Where things lie in shared memory: K blocks | V blocks | Q of each warpgroup, if at all | barriers | two lists | keys
// to sort.
template <typename Shape>
struct UnionShared {
  unsigned char* k;
  unsigned char* v;
  unsigned char* q;
  typename Shape::Barriers* barriers;
  typename Shape::Step* lists;
  int32_t most_steps;

  __device__ UnionShared(unsigned char* begin, const UnionParams& u)
      : k(begin),
        v(begin + Shape::kStagesK * Shape::kBytesK),
        q(begin + Shape::kRingBytes),
        barriers(reinterpret_cast<typename Shape::Barriers*>(q + Shape::kGroups * Shape::kGroupBytes)),
        lists(reinterpret_cast<typename Shape::Step*>(barriers + 1)),
        most_steps(Shape::kGroups * group_tokens_of<Shape>(u) * u.num_selected) {}

  __device__ typename Shape::Step* list(uint32_t turn) const { return lists + (turn & 1) * most_steps; }
  __device__ uint32_t* keys() const { return reinterpret_cast<uint32_t*>(lists + 2 * most_steps); }
};

// Consecutive tokens of one sequence and up to `head_slots` heads of one KV head.
struct UnionTile {
  SequencePlace place;
  int32_t first_query;
  int32_t head_kv;
  int32_t first_head;  // among all query heads
  int32_t heads;

  // Keys before this are seen by the tile's token: none where there is no such token.
  __device__ int32_t limit(int token) const {
    const int32_t query = first_query + token;
    return query < place.q_length ? min(place.offset + query + 1, place.k_length) : 0;
  }
};

template <typename Shape>
__device__ inline UnionTile union_tile(const UnionParams& u, int32_t index) {
  const SequenceLayout& s = u.sequences;
  const int32_t head_slots = head_slots_of<Shape>(u);
  const int32_t head_tiles = (s.group + head_slots - 1) / head_slots;
  const int32_t tokens = Shape::kGroups * group_tokens_of<Shape>(u);
  const int32_t of_head = u.tiles / s.heads_kv;
  const int32_t slot = index % of_head / head_tiles;
  const int32_t head_tile = index % head_tiles;
  const Tile tile = find_tile(s, s.cumulative_q, 1, s.length_q, tokens, slot);
  UnionTile result;
  result.place = place_of(s, tile.sequence);
  result.first_query = tile.index * tokens;
  result.head_kv = index / of_head;
  result.first_head = result.head_kv * s.group + head_tile * head_slots;
  result.heads = min(head_slots, s.group - head_tile * head_slots);
  return result;
}

// The bits of a step's tokens that belong to a warpgroup.
template <typename Shape>
__device__ inline uint32_t tokens_of_group(typename Shape::Step step, int group, int group_tokens) {
  return static_cast<uint32_t>(step >> (group * group_tokens)) & ((1u << group_tokens) - 1);
}
// A bit for each warp that has one of these tokens.
__device__ inline uint32_t warps_of_tokens(uint32_t tokens, int group_tokens) {
  if (group_tokens == 4) {
    return tokens;
  }
  tokens |= tokens >> 1;
  return group_tokens == 8 ? tokens & 0x55 : (tokens | tokens >> 2) & 0x1111;
}
// Whether the group's warps take a block alone, each for itself: where few chose it, and all of it is seen.
template <typename Shape>
__device__ inline bool taken_alone(uint32_t tokens, int group_tokens, int32_t block, int32_t limit) {
  return __popc(warps_of_tokens(tokens, group_tokens)) <= Shape::kMostAlone && (block + 1) * Shape::kKeys <= limit;
}

// Sorts keys in shared memory by one warp, by a network.
__device__ inline void sort_keys(uint32_t* all, int32_t count, int lane) {
  constexpr int kAtOnce = 4;
  // Puts pairs (i, j) in order, i < j, for p below `end`.
  const auto exchange = [&](int32_t end, const auto& pair_of) {
    for (int32_t p = lane; p < end; p += 32 * kAtOnce) {
      int32_t places[kAtOnce][2];
      uint32_t keys[kAtOnce][2];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        pair_of(p + 32 * k, places[k]);
        const bool valid = places[k][1] < count;
        keys[k][0] = valid ? all[places[k][0]] : 0;
        keys[k][1] = valid ? all[places[k][1]] : 0;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (keys[k][0] > keys[k][1]) {
          all[places[k][0]] = keys[k][1];
          all[places[k][1]] = keys[k][0];
        }
      }
    }
    __syncwarp();
  };
  for (int bits = 0; (1 << bits) < count; ++bits) {  // runs of 2^bits are in order
    const int32_t end = (count + (1 << bits)) / 2;
    exchange(end, [&](int32_t p, int32_t (&to)[2]) {
      const int32_t first = p >> bits << (bits + 1);
      const int32_t at = p & ((1 << bits) - 1);
      to[0] = first + at;
      to[1] = first + (2 << bits) - 1 - at;
    });
    for (int b = bits - 1; b >= 0; --b) {
      exchange(end, [&](int32_t p, int32_t (&to)[2]) {
        to[0] = p >> b << (b + 1) | (p & ((1 << b) - 1));
        to[1] = to[0] + (1 << b);
      });
    }
  }
}

// The keys to sort of a tile's lists, (block, token): none where a block begins past what the token sees.
constexpr uint32_t kNoKey = 0xffffffff;
template <typename Shape>
__device__ inline void gather_keys(uint32_t* keys, int32_t count, const UnionTile& tile, const UnionParams& u,
                                   int lane) {
  const int64_t token = tile.place.batch * u.sequences.length_q + tile.place.q_begin + tile.first_query;
  const int32_t* const lists = u.block_indices + (token * u.sequences.heads_kv + tile.head_kv) * u.num_selected;
  const int32_t stride = u.sequences.heads_kv * u.num_selected;
#pragma unroll(Shape::kHeadSlots == 0 ? 1 : 4)  // where registers are few
  for (int32_t i = lane; i < count; i += 32) {
    const int32_t of = i / u.num_selected;
    const int32_t limit = tile.limit(of);
    const int32_t block = limit > 0 ? __ldg(lists + of * stride + i % u.num_selected) : -1;
    keys[i] = block >= 0 && int64_t{block} * Shape::kKeys < limit ? static_cast<uint32_t>(block) << 16 | of : kNoKey;
  }
}

// Joins sorted keys to steps. Returns how many.
template <typename Shape>
__device__ inline int32_t join_keys(typename Shape::Step* to, const uint32_t* keys, int32_t count, int lane) {
  using Step = typename Shape::Step;
  int32_t steps = 0;
  uint32_t last = kNoKey;
  for (int32_t first = 0; first < count; first += 32) {
    const uint32_t key = first + lane < count ? keys[first + lane] : kNoKey;
    uint32_t before = __shfl_up_sync(0xffffffffu, key, 1);
    before = lane == 0 ? last : before;
    last = __shfl_sync(0xffffffffu, key, 31);
    const bool begins = key != kNoKey && (before == kNoKey || before >> 16 != key >> 16 || before == key);
    const uint32_t all = __ballot_sync(0xffffffffu, begins);
    const int32_t at = steps + __popc(all & (0xffffffffu >> (31 - lane))) - 1;
    if (begins) {
      to[at] = static_cast<Step>(key >> 16) << Shape::kTokenBits | Step{1} << (key & 0xffff);
    }
    __syncwarp();
    if (key != kNoKey && !begins) {
      atomicOr(reinterpret_cast<uint32_t*>(&to[at]) + (key >> 5 & 1), 1u << (key & 31));
    }
    steps += __popc(all);
  }
  return steps;
}

// How many of the block's warps have no part in a step.
template <typename Shape>
__device__ inline int absent_warps(typename Shape::Step step, const UnionTile& tile, int group_tokens) {
  const int32_t block = static_cast<int32_t>(step >> Shape::kTokenBits);
  int absent = Shape::kWarps;
#pragma unroll
  for (int group = 0; group < Shape::kGroups; ++group) {
    const uint32_t tokens = tokens_of_group<Shape>(step, group, group_tokens);
    const int32_t limit = Shape::kOnlyKeys ? tile.place.k_length : tile.limit(group * group_tokens);
    const bool alone = taken_alone<Shape>(tokens, group_tokens, block, limit);
    absent -= tokens == 0 ? 0 : alone ? __popc(warps_of_tokens(tokens, group_tokens)) : 4;
  }
  return absent;
}

// Joins the lists of a tile's tokens by sorting (block, token). What begins past what a token sees is left out; what a
// list holds twice makes two steps. Returns how many steps it wrote. By one warp.
template <typename Shape>
__device__ inline int32_t merge_lists(const UnionShared<Shape>& shared, uint32_t turn, const UnionParams& u, int lane) {
  using Step = typename Shape::Step;
  const int32_t count = shared.most_steps;
  Step* const to = shared.list(turn);
  // Computed twice, for registers are few.
  const auto tile_now = [&] {
    return union_tile<Shape>(u, static_cast<int32_t>(u.first_tile + fresh_block() + turn * gridDim.x));
  };
  gather_keys<Shape>(shared.keys(), count, tile_now(), u, lane);
  __syncwarp();
  sort_keys(shared.keys(), count, lane);
  const int32_t steps = join_keys<Shape>(to, shared.keys(), count, lane);
  __syncwarp();
  const UnionTile tile = tile_now();
  const int group_tokens = group_tokens_of<Shape>(u);
  for (int32_t i = lane; i < steps; i += 32) {
    const Step step = to[i];
    to[i] = step | static_cast<Step>(absent_warps<Shape>(step, tile, group_tokens)) << Shape::kAbsentBit;
  }
  __syncwarp();
  return steps;
}

}  // namespace nsa
