// What the forward and the gradient of q share: a block of threads holds one query with up to 16 heads of a group, the
// 16 rows of a matrix instruction. Its four warps share out the keys of the query's blocks, 16 at a time; each fetches
// its own through buffers of its own, so that no warp waits for another before the end, when their sums are added.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sm80/tile.cuh"
#include "common/softmax.cuh"

namespace nsa {

constexpr int kTokenWarps = 4;

template <typename Element_, int kDimK_, int kDimV_, int kStages_>
struct TokenShape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kStages = kStages_;
  static constexpr int kWarps = kTokenWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16;
  static constexpr int kKeys = 16;
  static constexpr int kStageSize = kKeys * (kDimK + kDimV);  // elements
  using QTile = SharedTile<Element, kRows, kDimK>;
  using GradOutTile = SharedTile<Element, kRows, kDimV>;
  using KTile = SharedTile<Element, kKeys, kDimK>;
  using VTile = SharedTile<Element, kKeys, kDimV>;
  // One warp's float32 sums lie where its buffers were.
  static_assert(kStages * kStageSize * sizeof(Element) >= kRows * kDimK * sizeof(float));
};

template <typename Shape>
constexpr int64_t selected_forward_shared_bytes(int32_t num_selected) {
  return sizeof(typename Shape::Element) * (Shape::QTile::kSize + Shape::kWarps * Shape::kStages * Shape::kStageSize) +
         4 * num_selected;
}

// The query, its sequence, and the heads of this block of threads.
struct TokenPlace {
  SequencePlace place;
  int32_t query;
  int32_t position;
  int32_t head_kv;
  int32_t first_head;  // among all query heads
  int32_t heads;       // at most 16
  int64_t list;        // where the query's list begins
};

// One KV head after the other, so that the keys in use stay in the L2 cache.
__device__ inline TokenPlace token_place(const SequenceLayout& s, int64_t tokens, int32_t num_selected) {
  const int32_t head_tiles = (s.group + 15) / 16;
  const int64_t index = blockIdx.x / static_cast<unsigned>(head_tiles);
  const int32_t head_tile = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(head_tiles));
  const int64_t token = index % tokens;
  TokenPlace result;
  result.head_kv = static_cast<int32_t>(index / tokens);
  const Tile tile = find_query(s, token);
  result.place = place_of(s, tile.sequence);
  result.query = tile.index;
  result.position = result.place.offset + tile.index;
  result.first_head = result.head_kv * s.group + head_tile * 16;
  result.heads = min(16, s.group - head_tile * 16);
  result.list = (token * s.heads_kv + result.head_kv) * num_selected;
  return result;
}

__device__ inline int64_t count_tokens(const SequenceLayout& s) {
  return s.packed() ? s.length_q : s.batch * s.length_q;
}

// The 16 keys that a warp takes in its turn `unit`: part `unit % parts` of the block that stands at unit / parts in the
// list.
struct KeyUnit {
  int32_t first_key;
  int32_t count;  // keys that exist and are seen: none when there is nothing to read
};

// Writes the blocks of a query's list that begin before `limit` to shared memory, and how many they are. -1, and
// whatever else a caller's own list holds, is left out. By one warp.
__device__ inline void read_list(int32_t* list, int32_t& count, const int32_t* from, int32_t num_selected,
                                 int32_t select_size, int32_t limit, int lane) {
  int32_t written = 0;
  for (int32_t first = 0; first < num_selected; first += 32) {
    const int32_t block = first + lane < num_selected ? from[first + lane] : -1;
    const bool valid = block >= 0 && int64_t{block} * select_size < limit;
    const unsigned votes = __ballot_sync(0xffffffffu, valid);
    if (valid) {
      list[written + __popc(votes & ((1u << lane) - 1))] = block;
    }
    written += __popc(votes);
  }
  if (lane == 0) {
    count = written;
  }
}

// The units of a query's list: this warp's, in order, are warp, warp + 4, ...
struct UnitWalk {
  const int32_t* list;  // in shared memory
  int32_t entries;
  int32_t select_size;
  int32_t limit;  // keys before it are seen
  int32_t parts;  // units of a block
  int32_t entry;
  int32_t part;

  __device__ UnitWalk(const int32_t* list_, int32_t entries_, int32_t select_size_, int32_t limit_, int warp)
      : list(list_), entries(entries_), select_size(select_size_), limit(limit_) {
    parts = (select_size + 15) / 16;
    entry = warp / parts;
    part = warp % parts;
  }
  __device__ bool done() const { return entry >= entries; }
  __device__ KeyUnit unit() const {
    const int64_t block = int64_t{list[entry]} * select_size;
    const int64_t first = block + 16 * part;
    const int64_t end = min_of(block + select_size, limit);
    return {static_cast<int32_t>(min_of(first, limit)), static_cast<int32_t>(max_of(min_of(end - first, 16), 0))};
  }
  __device__ void advance() {
    part += kTokenWarps;
    while (part >= parts) {
      part -= parts;
      ++entry;
    }
  }
};

// Copies the rows of one query's heads.
template <typename Tile>
__device__ inline void copy_heads(const Tile& to, const TensorView& from, const TokenPlace& at, int thread,
                                  int threads) {
  using Element = typename Tile::Element;
  to.copy_rows(from.width, from.data, thread, threads, [&](int row) -> const Element* {
    return row < at.heads ? from.row<Element>(at.place.batch, at.place.q_begin + at.query, at.first_head + row)
                          : nullptr;
  });
}

// Columns from `count` on get -inf.
template <int kTiles>
__device__ inline void keep_first(float (&c)[kTiles][4], int32_t count, int lane) {
  keep_range(c, 0, 0, count, lane);
  keep_range(c, 1, 0, count, lane);
}

// Writes this warp's sums, each of the lane's two rows times its factor, as float32 (16, kColumns).
template <int kTiles>
__device__ inline void store_sums(float* to, const float (&sums)[kTiles][4], const float (&factor)[2], int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      *reinterpret_cast<float2*>(to + (lane / 4 + 8 * half) * (8 * kTiles) + 8 * i + 2 * (lane % 4)) =
          make_float2(sums[i][2 * half] * factor[half], sums[i][2 * half + 1] * factor[half]);
    }
  }
}

// Adds the four warps' sums, which lie `apart` floats from each other, and writes the rows of the query's heads.
template <typename Element, int kColumns>
__device__ inline void write_heads(const TensorView& to, const float* sums, int apart, const TokenPlace& at,
                                   float factor, bool add, int thread, int threads) {
  constexpr int kChunks = kColumns / kChunk;
  for (int i = thread; i < 16 * kChunks; i += threads) {
    const int row = i / kChunks;
    const int column = i % kChunks * kChunk;
    if (row >= at.heads || column >= to.width) {
      continue;
    }
    float total[kChunk] = {};
#pragma unroll
    for (int warp = 0; warp < kTokenWarps; ++warp) {
      const float4* const from = reinterpret_cast<const float4*>(sums + warp * apart + row * kColumns + column);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4 four = from[j];
        total[4 * j] += four.x;
        total[4 * j + 1] += four.y;
        total[4 * j + 2] += four.z;
        total[4 * j + 3] += four.w;
      }
    }
    uint4 value{
        pack<Element>(total[0] * factor, total[1] * factor), pack<Element>(total[2] * factor, total[3] * factor),
        pack<Element>(total[4] * factor, total[5] * factor), pack<Element>(total[6] * factor, total[7] * factor)};
    uint4* const address = reinterpret_cast<uint4*>(
        to.row<Element>(at.place.batch, at.place.q_begin + at.query, at.first_head + row) + column);
    *address = add ? add_chunks<Element>(value, *address) : value;
  }
}

}  // namespace nsa
