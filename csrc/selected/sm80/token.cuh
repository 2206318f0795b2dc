// What the forward and the gradient of q share: a block of threads holds one query with up to 16 heads of a group, the
// 16 rows of a matrix instruction. Its four warps share out the keys of the query's blocks, 16 at a time; each fetches
// its own through buffers of its own, so that no warp waits for another before the end, when their sums are added.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sm80/tile.cuh"
#include "common/softmax.cuh"
#include "common/tile_dims.h"
#include "selected/tiles.h"

namespace nsa {

constexpr int kTokenWarps = selected_sm80::kWarps;
constexpr int kTokenThreads = 32 * kTokenWarps;

template <typename Element, int kDimK, int kDimV, int kStages_>
struct TokenShape : TileDimsOf<Element, kDimK, kDimV> {
  static constexpr int kStages = kStages_;
  static constexpr int kWarps = kTokenWarps;
  static constexpr int kThreads = kTokenThreads;
  static constexpr int kRows = selected_sm80::kRows;
  static constexpr int kKeys = selected_sm80::kWarpKeys;
  static constexpr int kStageSize = kKeys * (kDimK + kDimV);  // elements
  using QTile = SharedTile<Element, kRows, kDimK>;
  using GradOutTile = SharedTile<Element, kRows, kDimV>;
  using KTile = SharedTile<Element, kKeys, kDimK>;
  using VTile = SharedTile<Element, kKeys, kDimV>;
  // One warp's float32 sums lie where its buffers were.
  static_assert(kStages * kStageSize * sizeof(Element) >= kRows * kDimK * sizeof(float));
};

// The query, its sequence, and the heads of this block of threads.
struct TokenPlace {
  SequencePlace place;
  int32_t query;
  int32_t position;
  int32_t head_kv;
  int32_t first_head;  // among all query heads
  int32_t heads;       // at most 16
  int64_t list;        // where the query's list begins

  __device__ int32_t limit() const { return min(position + 1, place.k_length); }  // keys before it are seen
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

// The units of one warp: it walks them, and fills its buffers with the keys and values of those to come.
template <typename Shape, typename Params>
struct TokenFeed {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;

  const Params& params;
  const TokenPlace& at;
  Element* own;  // kStages buffers
  UnitWalk ahead;
  UnitWalk walk;
  int stage = 0;

  // Begins to fill all buffers but one.
  __device__ TokenFeed(const Params& params_, const TokenPlace& at_, Element* own_, const UnitWalk& units)
      : params(params_), at(at_), own(own_), ahead(units), walk(units) {
#pragma unroll
    for (int i = 0; i + 1 < Shape::kStages; ++i) {
      copy_next(i);
    }
  }
  __device__ KTile k_tile(int of_stage) const { return {own + of_stage * Shape::kStageSize}; }
  __device__ VTile v_tile(int of_stage) const { return {k_tile(of_stage).data + KTile::kSize}; }

  __device__ void copy_next(int to_stage) {
    if (!ahead.done()) {
      const KeyUnit unit = ahead.unit();
      const int64_t first = at.place.k_begin + unit.first_key;
      k_tile(to_stage).template copy_consecutive<32>(params.k.template row<Element>(at.place.batch, first, at.head_kv),
                                                     params.k.token_stride, unit.count, params.k.width, this_lane());
      v_tile(to_stage).template copy_consecutive<32>(params.v.template row<Element>(at.place.batch, first, at.head_kv),
                                                     params.v.token_stride, unit.count, params.v.width, this_lane());
      ahead.advance();
    }
    commit_copies();
  }
  // Waits for the buffers of the walk's unit.
  __device__ void begin_step() {
    __syncwarp();  // every lane is done with the buffer that is filled now
    copy_next(stage == 0 ? Shape::kStages - 1 : stage - 1);
    wait_copies<Shape::kStages - 1>();
    __syncwarp();
  }
  __device__ void end_step() { stage = stage + 1 == Shape::kStages ? 0 : stage + 1; }
};

// What a block of threads has in shared memory after its tiles of rows: its warps' buffers, then the query's list.
template <typename Shape>
struct TokenBuffers {
  using Element = typename Shape::Element;
  static constexpr int kWarpSize = Shape::kStages * Shape::kStageSize;
  static constexpr int kFloatsApart = kWarpSize * sizeof(Element) / sizeof(float);

  Element* data;

  __device__ Element* own() const { return data + this_warp() * kWarpSize; }
  __device__ int32_t* list() const { return reinterpret_cast<int32_t*>(data + Shape::kWarps * kWarpSize); }
  __device__ float* sums() const { return reinterpret_cast<float*>(data); }
  __device__ float* own_sums() const { return reinterpret_cast<float*>(own()); }

  // By the first warp; `count` is in shared memory as well.
  template <typename Params>
  __device__ void read_list(const Params& params, const TokenPlace& at, int32_t& count) const {
    if (this_warp() == 0) {
      nsa::read_list(list(), count, params.block_indices + at.list, params.num_selected, params.select_size, at.limit(),
                     this_lane());
    }
  }
  template <typename Params>
  __device__ TokenFeed<Shape, Params> feed(const Params& params, const TokenPlace& at, int32_t count) const {
    return {params, at, own(), UnitWalk(list(), count, params.select_size, at.limit(), this_warp())};
  }
};

// Copies the rows of one query's heads.
template <typename Tile>
__device__ inline void copy_heads(const Tile& to, const TensorView& from, const TokenPlace& at) {
  using Element = typename Tile::Element;
  to.copy_rows(from.width, from.data, static_cast<int>(threadIdx.x), kTokenThreads, [&](int row) -> const Element* {
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
                                   float factor, bool add) {
  constexpr int kChunks = kColumns / kChunk;
  for (int i = static_cast<int>(threadIdx.x); i < 16 * kChunks; i += kTokenThreads) {
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
