// select_blocks for 16-bit elements. Of each query, with the lse of compressed attention known:
//   p[m] = sum over the group's heads of exp(scale <q, k_m> - lse), for the compressed blocks m that it sees
// and from p the list of blocks (selection/ranking.cuh).
//
// The product is k q^T: keys are the rows, the heads of a query lie side by side along the columns, so that summing
// over the heads takes additions within a lane and two exchanges. A block of threads walks the compressed keys, in
// tiles of kKeysPerTile, for queries of one KV head. Each warp has 32 columns: 4, 2 or 1 queries of up to 8, 16 or 32
// heads each; or, of a larger group, every `parts` warps have one query together, 32 heads each. Columns without a head
// hold zeros, and lse +inf.
//
// Grid: (slots of query tiles, KV heads), the heads fastest. Registers hold all of a warp's queries. Shared memory: two
// tiles of keys, and a record for each query (for each warp, where several share one).
#pragma once

#include "common/rows.cuh"
#include "common/sm80/tile.cuh"
#include "selection/ranking.cuh"

namespace nsa {

constexpr int kHeadsPerWarp = select_sm80::kHeadsPerWarp;

template <typename Element_, int kDim_, int kQueries_>
struct SelectShape {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kQueries = kQueries_;  // of a warp
  static constexpr int kWarps = select_sm80::kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSM = kDim <= 128 ? 2 : 1;
  // Of 16 keys, computed together: with few warps, one's exponentials should meet the other's products.
  static constexpr int kRowTiles = kDim == 128 ? 1 : 2;
  static constexpr int kColumnTiles = kHeadsPerWarp / 8;
  static constexpr int kTilesPerQuery = kColumnTiles / kQueries;
  using KTile = SharedTile<Element, kKeysPerTile, kDim>;
  static constexpr int kStageBytes = KTile::kSize * sizeof(Element);
};

// A warp's queries, as the right operand of the product, and what their scores are shifted by.
template <typename Shape>
struct WarpQueries {
  uint32_t columns[Shape::kDim / 16][Shape::kColumnTiles][2];
  float shifts[Shape::kColumnTiles][2];  // -lse log2(e), of columns 2 (lane % 4) and the next; -inf: no head there

  // `query_of(i)`: the warp's query i, or -1.
  template <typename QueryOf>
  __device__ void load(const SelectBlocksParams& params, const SequencePlace& place, int32_t head_kv, int part,
                       const QueryOf& query_of, int lane) {
    const int32_t group = params.sequences.group;
#pragma unroll
    for (int i = 0; i < Shape::kColumnTiles; ++i) {
      const int32_t query = query_of(i / Shape::kTilesPerQuery);
      const int32_t first_head = kHeadsPerWarp * part + 8 * (i % Shape::kTilesPerQuery);
      load_columns(i, params, place, query, head_kv * group, first_head + lane / 4, lane);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int32_t head = first_head + 2 * (lane % 4) + j;
        shifts[i][j] = query >= 0 && head < group
                           ? -kLog2E * params.lse.at(place.batch, head_kv * group + head, place.q_begin + query)
                           : kMinusInfinity;
      }
    }
  }

 private:
  __device__ void load_columns(int i, const SelectBlocksParams& params, const SequencePlace& place, int32_t query,
                               int32_t first_of_group, int32_t head, int lane) {
    using Element = typename Shape::Element;
    const bool exists = query >= 0 && head < params.sequences.group;
    const Element* const row =
        exists ? params.q.row<const Element>(place.batch, place.q_begin + query, first_of_group + head) : nullptr;
    const int32_t width = exists ? params.q.width : 0;
#pragma unroll
    for (int step = 0; step < Shape::kDim / 16; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * step + 8 * half;
        columns[step][i][half] = column < width ? *reinterpret_cast<const uint32_t*>(row + column + 2 * (lane % 4)) : 0;
      }
    }
  }
};

// Sums over the four lanes that share an accumulator's rows, shared out: this lane gets those of the tile's row
// lane / 4 + 8 (lane % 2), of queries first, first + 1, ... where first is 0 in the lower two lanes and kQueries / 2 in
// the upper two; of the only query, when there is one. sums[i][half] is this lane's part for query i and row lane / 4 +
// 8 half.
template <int kQueries, int kKept>
__device__ inline void share_sums(float (&kept)[kKept], const float (&sums)[kQueries][2], int lane) {
  static_assert(kKept == (kQueries + 1) / 2);
  float rows[kQueries];
  const bool odd = lane & 1;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    const float other = __shfl_xor_sync(kWholeWarp, odd ? sums[i][0] : sums[i][1], 1);
    rows[i] = (odd ? sums[i][1] : sums[i][0]) + other;
  }
  const bool upper = lane & 2;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int partner = kQueries == 1 ? i : i + kKept;
    const float other = __shfl_xor_sync(kWholeWarp, upper ? rows[i] : rows[partner], 2);
    kept[i] = (upper ? rows[partner] : rows[i]) + other;
  }
}

// The probabilities of one tile of keys, into the strips of a warp's records. `visible[i]`: how many keys the query
// sees that this lane gets sums of.
template <typename Shape, int kKept>
__device__ inline void write_probabilities(QueryRecord* records, const WarpQueries<Shape>& queries,
                                           const typename Shape::KTile& k_tile, int32_t first_key, float scale_log2,
                                           const int32_t (&visible)[kKept], int lane) {
  using Element = typename Shape::Element;
  constexpr int kRowTiles = Shape::kRowTiles;
#pragma unroll
  for (int row = 0; row < kKeysPerTile; row += 16 * kRowTiles) {
    float scores[kRowTiles][Shape::kColumnTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      clear(scores[r]);
    }
#pragma unroll
    for (int step = 0; step < Shape::kDim / 16; ++step) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        uint32_t a[4];
        k_tile.load_left(a, row + 16 * r, 16 * step, lane);
#pragma unroll
        for (int i = 0; i < Shape::kColumnTiles; ++i) {
          multiply_add<Element>(scores[r][i], a, queries.columns[step][i][0], queries.columns[step][i][1]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float sums[Shape::kQueries][2] = {};
#pragma unroll
      for (int i = 0; i < Shape::kColumnTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i / Shape::kTilesPerQuery][j / 2] +=
              exp2_approx(fmaf(scores[r][i][j], scale_log2, queries.shifts[i][j % 2]));
        }
      }
      float kept[kKept];
      share_sums(kept, sums, lane);
      const int32_t key = first_key + row + 16 * r + 8 * (lane & 1) + lane / 4;
      const int first = Shape::kQueries == 1 || !(lane & 2) ? 0 : kKept;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        records[first + i].strip[key & (kRing - 1)] = key < visible[i] ? kept[i] : 0.f;
      }
    }
  }
}

// What a block of threads works on. It lies in shared memory: in the loop over the keys every register counts.
struct SelectWork {
  SequencePlace place;
  TileSteps steps;
  int32_t head_kv;
  int32_t first_query;
  int32_t end_query;
  int32_t end_key;  // compressed keys that the last query sees
  int32_t tiles;    // enough for every selectable block, also those of keys that nobody sees yet

  __device__ SelectWork(const SelectBlocksParams& params, int32_t queries_per_tile) : steps(params) {
    const SelectTile tile = find_select_tile(params, queries_per_tile);
    place = place_of(params.sequences, tile.sequence);
    head_kv = tile.head_kv;
    first_query = tile.first_query;
    end_query = min(first_query + queries_per_tile, place.q_length);
    const int32_t last_position = place.offset + end_query - 1;
    end_key = visible_keys(params, last_position);
    tiles = static_cast<int32_t>(ceil_div(own_block_of(last_position, params.select_size) + 1, steps.blocks));
  }
};

static_assert(sizeof(SelectWork) <= select_sm80::kWorkBytes);

// Starts to copy a tile of keys; those that the last query doesn't see become zeros.
template <typename Shape>
__device__ inline void copy_key_tile(const typename Shape::KTile& to, const SelectBlocksParams& params,
                                     const SelectWork& work, int32_t number, int thread) {
  const int32_t first = number * work.steps.keys;
  to.template copy_consecutive<Shape::kThreads>(
      params.k.row<const typename Shape::Element>(work.place.batch, work.place.cmp_begin + first, work.head_kv),
      params.k.token_stride, work.end_key - first, params.k.width, thread);
  commit_copies();
}

// The queries of a warp: `first` and those after it.
template <int kQueries>
struct QueriesOfWarp {
  const SelectBlocksParams& params;
  const SelectWork& work;
  int32_t first;

  __device__ int32_t query(int i) const { return first + i < work.end_query ? first + i : -1; }
  __device__ int32_t position(int i) const { return query(i) < 0 ? -1 : work.place.offset + query(i); }

  __device__ void start(QueryRecord* records) const {
    for (int i = 0; i < kQueries; ++i) {
      start_record(records[i], params, position(i), this_lane());
    }
  }
  __device__ void write_lists(const QueryRecord* records) const {
    for (int i = 0; i < kQueries; ++i) {
      if (query(i) >= 0) {
        write_list(records[i], params, list_of(params, work.place, query(i), work.head_kv), this_lane());
      }
    }
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSM)
    select_blocks_sm80(const __grid_constant__ SelectBlocksParams params) {
  constexpr int kQueries = Shape::kQueries;
  constexpr int kKept = (kQueries + 1) / 2;
  extern __shared__ __align__(1024) unsigned char shared[];
  QueryRecord* const all_records = reinterpret_cast<QueryRecord*>(shared + 2 * Shape::kStageBytes);
  SelectWork& work = *reinterpret_cast<SelectWork*>(all_records + Shape::kWarps * kQueries);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = this_lane();
  const int warp = this_warp();
  const auto stage = [&](int32_t number) -> typename Shape::KTile {
    return {reinterpret_cast<typename Shape::Element*>(shared + (number & 1) * Shape::kStageBytes)};
  };

  const int parts = (params.sequences.group + kHeadsPerWarp - 1) / kHeadsPerWarp;  // 1, if kQueries > 1
  if (thread == 0) {
    work = SelectWork(params, Shape::kWarps * kQueries / parts);
  }
  __syncthreads();
  if (work.first_query >= work.end_query) {
    return;
  }
  const int32_t tiles = work.tiles;
  if (tiles > 0) {
    copy_key_tile<Shape>(stage(0), params, work, 0, thread);
  }

  QueryRecord* const records = all_records + warp * kQueries;
  const QueriesOfWarp<kQueries> of_warp{params, work, work.first_query + warp / parts * kQueries};
  of_warp.start(records);
  int32_t visible[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    visible[i] = visible_keys(params, of_warp.position(kQueries == 1 || !(lane & 2) ? i : i + kKept));
  }
  WarpQueries<Shape> queries;
  queries.load(params, work.place, work.head_kv, warp % parts, [&](int i) { return of_warp.query(i); }, lane);

  for (int32_t number = 0; number < tiles; ++number) {
    wait_copies<0>();
    __syncthreads();
    if (number + 1 < tiles) {
      copy_key_tile<Shape>(stage(number + 1), params, work, number + 1, thread);
    }
    write_probabilities<Shape>(records, queries, stage(number), number * work.steps.keys, params.scale * kLog2E,
                               visible, lane);
    if (parts > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    if (warp % parts == 0) {
      rank_tile<kQueries>(records, parts, params, work.steps, number, lane);
    }
  }

  if (warp % parts == 0) {
    __syncwarp();
    of_warp.write_lists(records);
  }
}

}  // namespace nsa
