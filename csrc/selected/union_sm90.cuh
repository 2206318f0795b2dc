// Tiles of consecutive tokens and the union of their lists of blocks, for Hopper's selected attention.
#pragma once

#include "common/hopper.cuh"
#include "common/rows.cuh"
#include "selected/params.h"

namespace nsa {

// kGroups warpgroups own 64 rows each: the heads of four tokens, or of eight where a group has at most eight heads.
// kGradients: rows have a gradient of the output beside Q. kWide: tiles may have more than 16 tokens.
// Up to kMostAlone warps of a warpgroup take a block by themselves, by mma.sync; more take it together, by wgmma.
// kHeadSlots: rows of a token, 16 or 8; 0 where the launch says which.
template <typename Element_, int kDimK_, int kDimV_, bool kGradients_, int kGroups_, int kStagesK_, int kStagesV_,
          bool kWide_, int kMostAlone_, int kHeadSlots_ = kWide_ ? 0 : 16>
struct UnionShape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr bool kGradients = kGradients_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kStagesK = kStagesK_;
  static constexpr int kStagesV = kStagesV_;
  static constexpr bool kWide = kWide_;
  static constexpr int kMostAlone = kMostAlone_;
  static constexpr int kHeadSlots = kHeadSlots_;
  static constexpr int kKeys = 64;
  static constexpr int kRows = 64;
  static constexpr int kWarps = 4 * kGroups;  // consumers
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 160;
  static constexpr bool kOnlyKeys = false;         // whether steps have no V, and tiles no rows
  using KTile = PanelTile<Element, kKeys, kDimK>;  // of Q too: as many rows as keys
  using VTile = PanelTile<Element, kKeys, kDimV>;
  static_assert(kRows == kKeys);
  static constexpr int kBytesK = KTile::kSize * 2;
  static constexpr int kBytesV = VTile::kSize * 2;
  static constexpr int kRingBytes = kStagesK * kBytesK + kStagesV * kBytesV;
  static constexpr bool kQInRegisters = kDimK <= 128;  // elsewhere there are too few
  static constexpr int kGroupBytes = kQInRegisters ? 0 : kBytesK;
  // A block and a bit for each of the tile's tokens. Blocks are numbers below 2^16.
  using Step = std::conditional_t<kWide, uint64_t, uint32_t>;
  static constexpr int kTokenBits = kWide ? 32 : 16;

  struct Barriers {
    // Filled by the copies of a step, watched by the warps that need it, and drained by those; the producer arrives for
    // the others.
    Barrier k_full[kStagesK], k_empty[kStagesK];
    Barrier v_full[kStagesV], v_empty[kStagesV];
    Barrier list_full[2];    // written by the merging warp
    Barrier list_empty[2];   // read by the consumers and the producer
    uint32_t issued;         // steps whose copies are under way or done: before, `full` may be two phases behind
    int32_t steps[2];        // of each list
    uint32_t turns[kWarps];  // tiles that each consumer warp has done
    float grad_lse[kGradients ? kGroups * kRows : 1];  // of each row, over its gate
  };
};
constexpr int32_t kMostUnionBlocks = 1 << 16;
constexpr int32_t kMostUnionSelected = 64;         // blocks of a list
constexpr int64_t kMostUnionSharedBytes = 232448;  // what a block of threads may have

struct UnionParams {
  Sequences sequences;
  const int32_t* block_indices;
  int32_t num_selected;
  int32_t head_slots;  // rows of a token: 16, or 8 where a group has at most 8 heads
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
         2 * tokens * num_selected * static_cast<int64_t>(sizeof(typename Shape::Step));
}

// Where things lie in shared memory: K blocks | V blocks | Q of each warpgroup, if at all | barriers | two lists.
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
  const Sequences& s = u.sequences;
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
  return group_tokens == 4 ? tokens : (tokens | tokens >> 1) & 0x55;
}
// Whether the group's warps take a block alone, each for itself: where few chose it, and all of it is seen.
template <typename Shape>
__device__ inline bool taken_alone(uint32_t tokens, int group_tokens, int32_t block, int32_t limit) {
  return __popc(warps_of_tokens(tokens, group_tokens)) <= Shape::kMostAlone && (block + 1) * Shape::kKeys <= limit;
}

// Joins the lists of a tile's tokens, lane i holding token i's, by taking the lowest of all heads over and over. What
// begins past what a token sees is left out. Returns how many steps it wrote.
template <typename Shape>
__device__ inline int32_t merge_lists(typename Shape::Step* to, const UnionParams& u, const UnionTile& tile, int lane) {
  constexpr int32_t kNone = 0x7fffffff;
  const int32_t limit = lane < Shape::kGroups * group_tokens_of<Shape>(u) ? tile.limit(lane) : 0;
  const int64_t token = tile.place.batch * u.sequences.length_q + tile.place.q_begin + tile.first_query + lane;
  const int32_t* next = u.block_indices + (token * u.sequences.heads_kv + tile.head_kv) * u.num_selected;
  const int32_t* const end = limit > 0 ? next + u.num_selected : next;
  const auto take = [&] {
    while (next != end) {
      const int32_t block = __ldg(next++);  // from L1, for the most part
      if (block >= 0 && int64_t{block} * Shape::kKeys < limit) {
        return block;
      }
    }
    return kNone;
  };
  int32_t head = take();
  int32_t steps = 0;
  while (true) {
    const int32_t block = __reduce_min_sync(0xffffffffu, head);
    if (block == kNone) {
      return steps;
    }
    const uint32_t tokens = __ballot_sync(0xffffffffu, head == block);
    if (lane == 0) {
      to[steps] = static_cast<typename Shape::Step>(block) << Shape::kTokenBits | tokens;
    }
    ++steps;
    if (head == block) {
      head = take();
    }
  }
}

}  // namespace nsa
