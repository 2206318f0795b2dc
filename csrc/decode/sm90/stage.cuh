// Attention to keys as they stream from pages into a ring of stages of 128 keys: some warps fill it, others multiply.
//
// Of a stage's keys each consuming warp scores 16, for all rows. The weights change hands in shared memory, and each warp
// multiplies all of them with columns of its own: what it sums up is complete, and nothing is added up at the end.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sm90/copy.cuh"
#include "common/softmax.cuh"
#include "common/tile_dims.h"
#include "decode/ranges.cuh"
#include "decode/tiles.h"

namespace nsa {

// kStages_: of the ring. kRowTiles_: tiles of 16 rows.
template <typename Element_, int kDimK_, int kDimV_, int kRowTiles_, int kStages_>
struct StageShape : TileDimsOf<Element_, kDimK_, kDimV_> {
  using Element = Element_;
  using TileDimsOf<Element_, kDimK_, kDimV_>::kDimK;
  using TileDimsOf<Element_, kDimK_, kDimV_>::kDimV;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kStages = kStages_;
  static constexpr int kKeys = decode_sm90::kStageKeys;
  static constexpr int kProducers = 32 * decode_sm90::kProducerWarps;
  static constexpr int kWarps = decode_sm90::kConsumerWarps;
  static constexpr int kConsumers = 32 * kWarps;
  static constexpr int kThreads = decode_sm90::kThreads;
  static constexpr int kColumns = kDimV / kWarps;  // of a consuming warp
  using QTile = SharedTile<Element, kRows, kDimK>;
  using KTile = SharedTile<Element, kKeys, kDimK>;
  using VTile = SharedTile<Element, kKeys, kDimV>;
  using WeightTile = SharedTile<Element, kRows, kKeys>;
  static_assert(kKeys == 16 * kWarps && kKeys == 32 * decode_sm90::kProducerWarps && kColumns % 8 == 0);
};

template <typename Shape>
struct Ring {
  using Element = typename Shape::Element;
  Element k[Shape::kStages][Shape::KTile::kSize];
  Element v[Shape::kStages][Shape::VTile::kSize];
};

// A stage's keys and values are filled and drained each for themselves: keys are free as soon as they are scored.
template <typename Shape>
struct RingBarriers {
  Barrier k_full[Shape::kStages];
  Barrier k_empty[Shape::kStages];
  Barrier v_full[Shape::kStages];
  Barrier v_empty[Shape::kStages];

  __device__ void init() {
    init_ring(k_full, k_empty, Shape::kProducers, Shape::kWarps);
    init_ring(v_full, v_empty, Shape::kProducers, Shape::kWarps);
  }
};

// What the consuming warps tell each other.
template <typename Shape>
struct ConsumerExchange {
  float highest[Shape::kRows][Shape::kWarps];
  float total[Shape::kRows][Shape::kWarps];
};

constexpr int kConsumerBarrier = 1;
constexpr int kProducerBarrier = 2;
constexpr int kListBarrier = 3;

__device__ inline void sync_group(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
// What others wait for in sync_group.
__device__ inline void arrive_at_group(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
template <typename Shape>
__device__ inline void sync_consumers() {
  sync_group(kConsumerBarrier, Shape::kConsumers);
}
template <typename Shape>
__device__ inline void sync_producers() {
  sync_group(kProducerBarrier, Shape::kProducers);
}

// Keys and values of one head in their pools.
template <typename Element>
struct HeadPools {
  const Element* k;
  const Element* v;
  int32_t k_width;
  int32_t v_width;

  __device__ HeadPools(const PagedRows& keys, int32_t head)
      : k(static_cast<const Element*>(keys.k.data) + head * keys.k.head_stride),
        v(static_cast<const Element*>(keys.v.data) + head * keys.v.head_stride),
        k_width(keys.k.width),
        v_width(keys.v.width) {}
};

// Starts to copy 32 rows, from `first` on: each lane has its row's place in the pool, below 0 for a row of zeros.
template <typename Tile>
__device__ inline void copy_warp_rows(const Tile& tile, int first, const typename Tile::Element* pool, int32_t width,
                                      int64_t place) {
#pragma unroll 4
  for (int j = 0; j < Tile::kChunks; ++j) {
    const int i = 32 * j + this_lane();
    const int row = i / Tile::kChunks;
    const int index = i - row * Tile::kChunks;
    const int64_t from = __shfl_sync(0xffffffffu, place, row);
    const bool valid = from >= 0 && index * kChunk < width;
    copy_async(tile.chunk(first + row, index), pool + (valid ? from + index * kChunk : 0), valid);
  }
}

// By a producing warp: its 32 rows of a stage, once it is empty.
template <typename Shape>
__device__ inline void fill_stage(Ring<Shape>& ring, RingBarriers<Shape>& barriers, const RingPlace<Shape::kStages>& at,
                                  const HeadPools<typename Shape::Element>& pools, const RowOffsets& place) {
  const int first = 32 * this_warp();
  wait(&barriers.k_empty[at.stage], at.parity ^ 1);
  copy_warp_rows(typename Shape::KTile{ring.k[at.stage]}, first, pools.k, pools.k_width, place.k);
  arrive_after_copies(&barriers.k_full[at.stage]);
  wait(&barriers.v_empty[at.stage], at.parity ^ 1);
  copy_warp_rows(typename Shape::VTile{ring.v[at.stage]}, first, pools.v, pools.v_width, place.v);
  arrive_after_copies(&barriers.v_full[at.stage]);
}

// By all producers: queries of rows [first_row, ...), those from `rows` on as zeros.
template <typename Shape>
__device__ inline void fill_queries(typename Shape::Element* to, const DecodeParams& params,
                                    const DecodeSequence& sequence, int32_t head_kv, int32_t first_row, int32_t rows) {
  using Element = typename Shape::Element;
  const typename Shape::QTile tile{to};
  tile.copy_rows(params.q.width, params.q.data, static_cast<int>(threadIdx.x), Shape::kProducers,
                 [&](int i) -> const Element* {
                   const int32_t row = first_row + i;
                   if (row >= rows) {
                     return nullptr;
                   }
                   const int32_t query = static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
                   return params.q.row<Element>(sequence.batch, sequence.first + query,
                                                head_kv * params.group + row - query * params.group);
                 });
}

// What a consuming warp has summed up: of all rows, for its own columns. A row's highest score is the same in all warps,
// its total is of the keys that the lane has scored.
template <typename Shape>
struct StageSums {
  float highest[Shape::kRowTiles][2];
  float total[Shape::kRowTiles][2];
  float out[Shape::kRowTiles][Shape::kColumns / 8][4];

  __device__ StageSums() {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      clear(out[r]);
      highest[r][0] = highest[r][1] = kMinusInfinity;
      total[r][0] = total[r][1] = 0.f;
    }
  }
};

// Of the lane's rows: row r / 2, half r % 2 sees keys [low, high) of a split.
template <typename Shape>
struct SeenKeys {
  int32_t low[Shape::kRowTiles][2];
  int32_t high[Shape::kRowTiles][2];
};

__device__ inline int lane_row(int row_tile, int half) { return 16 * row_tile + this_lane() / 4 + 8 * half; }
template <typename Shape>
__device__ inline int consumer_warp() {
  return this_warp() - decode_sm90::kProducerWarps;
}

// The queries as left operands: those of one tile of rows stay in registers.
template <typename Shape>
struct QueryOperands {
  static constexpr bool kHeld = Shape::kRowTiles == 1;
  typename Shape::QTile tile;
  uint32_t held[kHeld ? Shape::kDimK / 16 : 1][4];

  __device__ explicit QueryOperands(typename Shape::Element* queries) : tile{queries} {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < Shape::kDimK / 16; ++i) {
        tile.load_left(held[i], 0, 16 * i, this_lane());
      }
    }
  }
  __device__ void load(uint32_t (&a)[4], int r, int column) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = held[column / 16][i];
      }
    } else {
      tile.load_left(a, 16 * r, column, this_lane());
    }
  }
};

// A consuming warp's part of a stage. `weights` and `exchange` are shared by all; `kept` (kRows, kKeptPitch), or null,
// takes the weights in float32, relative to sums.highest.
template <typename Shape>
struct StageConsumer {
  using Element = typename Shape::Element;
  const QueryOperands<Shape>& queries;
  typename Shape::WeightTile weights;
  ConsumerExchange<Shape>& exchange;
  float scale_log2;

  // The scores of 16 keys, those that are not seen -inf, and each row's highest of them to the other warps.
  __device__ void score(float (&scores)[Shape::kRowTiles][2][4], const typename Shape::KTile& keys,
                        const SeenKeys<Shape>& seen, int32_t first_key, int32_t last_key) const {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      clear(scores[r]);
    }
    const int warp = consumer_warp<Shape>();
    // Of one tile of rows the sums of every other column are apart: chains of products are half as long.
    constexpr int kChains = Shape::kRowTiles == 1 ? 2 : 1;
    float more[kChains][2][4] = {};
#pragma unroll
    for (int column = 0; column < Shape::kDimK; column += 16) {
      uint32_t b[4];
      keys.load_right_transposed(b, 16 * warp, column, this_lane());
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        uint32_t a[4];
        queries.load(a, r, column);
        float(&to)[2][4] = kChains == 2 && column / 16 % 2 == 1 ? more[0] : scores[r];
        multiply_add<Element>(to[0], a, b[0], b[1]);
        multiply_add<Element>(to[1], a, b[2], b[3]);
      }
    }
    if constexpr (kChains == 2) {
      add_tiles(scores[0], more[0]);
    }
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t low = seen.low[r][half];
        const int32_t high = min(seen.high[r][half], last_key);
        float highest = kMinusInfinity;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t key = first_key + 16 * warp + 8 * (i / 2) + 2 * (this_lane() % 4) + i % 2;
          float& x = scores[r][i / 2][2 * half + i % 2];
          x = key >= low && key < high ? x * scale_log2 : kMinusInfinity;
          highest = fmaxf(highest, x);
        }
        highest = row_max(highest);
        if (this_lane() % 4 == 0) {
          exchange.highest[lane_row(r, half)][warp] = highest;
        }
      }
    }
  }

  // Scores become weights, for all warps to read.
  __device__ void weigh(StageSums<Shape>& sums, const float (&scores)[Shape::kRowTiles][2][4], float* kept) const {
    const int warp = consumer_warp<Shape>();
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row(r, half);
        float now = sums.highest[r][half];
#pragma unroll
        for (int w = 0; w < Shape::kWarps; w += 4) {
          const float4 x = *reinterpret_cast<const float4*>(&exchange.highest[row][w]);
          now = fmaxf(now, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
        }
        const float factor = rescaling(sums.highest[r][half], now, 1.f);
        const float offset = now == kMinusInfinity ? 0.f : now;
        sums.highest[r][half] = now;
        float total = 0.f;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const float x = exp2_approx(scores[r][t][2 * half] - offset);
          const float y = exp2_approx(scores[r][t][2 * half + 1] - offset);
          total += x + y;
          *reinterpret_cast<uint32_t*>(weights.chunk(row, 2 * warp + t) + 2 * (this_lane() % 4)) = pack<Element>(x, y);
          if (kept != nullptr) {
            *reinterpret_cast<float2*>(kept + row * decode_sm90::kKeptPitch + 16 * warp + 8 * t +
                                       2 * (this_lane() % 4)) = make_float2(x, y);
          }
        }
        sums.total[r][half] = fmaf(sums.total[r][half], factor, total);
#pragma unroll
        for (int c = 0; c < Shape::kColumns / 8; ++c) {
          sums.out[r][c][2 * half] *= factor;
          sums.out[r][c][2 * half + 1] *= factor;
        }
      }
    }
  }

  // All weights of the stage, times the warp's columns of the values.
  __device__ void accumulate(StageSums<Shape>& sums, const typename Shape::VTile& values) const {
    const int column = Shape::kColumns * consumer_warp<Shape>();
    constexpr int kChains = Shape::kRowTiles == 1 ? 2 : 1;
    float more[kChains][Shape::kColumns / 8][4] = {};
#pragma unroll
    for (int key = 0; key < Shape::kKeys; key += 32) {
      uint32_t b[2][Shape::kColumns / 8][2];
      load_values(b, values, key, column);
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t a[4];
          weights.load_left(a, 16 * r, key + 16 * i, this_lane());
#pragma unroll
          for (int c = 0; c < Shape::kColumns / 8; ++c) {
            multiply_add<Element>(kChains == 2 && i == 1 ? more[0][c] : sums.out[r][c], a, b[i][c][0], b[i][c][1]);
          }
        }
      }
    }
    if constexpr (kChains == 2) {
      add_tiles(sums.out[0], more[0]);
    }
  }

  __device__ void attend(StageSums<Shape>& sums, Ring<Shape>& ring, RingBarriers<Shape>& barriers,
                         const RingPlace<Shape::kStages>& at, const SeenKeys<Shape>& seen, int32_t first_key,
                         int32_t last_key, float* kept) const {
    float scores[Shape::kRowTiles][2][4];
    wait(&barriers.k_full[at.stage], at.parity);
    score(scores, typename Shape::KTile{ring.k[at.stage]}, seen, first_key, last_key);
    release(&barriers.k_empty[at.stage]);
    sync_consumers<Shape>();
    weigh(sums, scores, kept);
    sync_consumers<Shape>();
    wait(&barriers.v_full[at.stage], at.parity);
    accumulate(sums, typename Shape::VTile{ring.v[at.stage]});
    release(&barriers.v_empty[at.stage]);
  }

 private:
  // The warp is done with a buffer, after products that read it.
  __device__ static void release(Barrier* empty) {
    __syncwarp();
    if (this_lane() == 0) {
      arrive(empty);
    }
  }

  template <int kTiles>
  __device__ static void add_tiles(float (&to)[kTiles][4], const float (&x)[kTiles][4]) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[t][j] += x[t][j];
      }
    }
  }

  // Right operands of 32 keys: [half of the keys][eight columns].
  __device__ static void load_values(uint32_t (&b)[2][Shape::kColumns / 8][2], const typename Shape::VTile& values,
                                     int key, int column) {
    uint32_t x[4];
    if constexpr (Shape::kColumns == 8) {
      load_matrices_transposed(x, shared_address(values.chunk(key + this_lane(), column / 8)));
      b[0][0][0] = x[0];
      b[0][0][1] = x[1];
      b[1][0][0] = x[2];
      b[1][0][1] = x[3];
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int c = 0; c < Shape::kColumns / 8; c += 2) {
          values.load_right(x, key + 16 * i, column + 8 * c, this_lane());
          b[i][c][0] = x[0];
          b[i][c][1] = x[1];
          b[i][c + 1][0] = x[2];
          b[i][c + 1][1] = x[3];
        }
      }
    }
  }
};

// Totals of the lanes, for all warps: complete after the next sync_consumers.
template <typename Shape>
__device__ inline void share_totals(ConsumerExchange<Shape>& exchange, const StageSums<Shape>& sums) {
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(sums.total[r][half]);
      if (this_lane() % 4 == 0) {
        exchange.total[lane_row(r, half)][consumer_warp<Shape>()] = total;
      }
    }
  }
}
template <typename Shape>
__device__ inline float total_of_row(const ConsumerExchange<Shape>& exchange, int row) {
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < Shape::kWarps; ++w) {
    total += exchange.total[row][w];
  }
  return total;
}

}  // namespace nsa
