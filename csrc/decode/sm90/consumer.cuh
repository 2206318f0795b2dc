// Attention to a stage of keys by the consuming warps.
//
// Of a stage's keys each warp scores 16, for all rows. The weights change hands in shared memory, and each warp
// multiplies all of them with columns of its own: what it sums up is complete, and nothing is added up at the end.
#pragma once

#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "decode/sm90/stage.cuh"

namespace nsa {

// What the consuming warps tell each other.
template <typename Shape>
struct ConsumerExchange {
  float highest[Shape::kRows][Shape::kWarps];
  float total[Shape::kRows][Shape::kWarps];
};

// What a consuming warp has summed up: of all rows, for its own columns. A row's highest score is the same in all
// warps, its total is of the keys that the lane has scored.
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
        float (&to)[2][4] = kChains == 2 && column / 16 % 2 == 1 ? more[0] : scores[r];
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
    release(&barriers.k_empty[at.stage], mixed(scores));
    sync_consumers<Shape>();
    weigh(sums, scores, kept);
    sync_consumers<Shape>();
    wait(&barriers.v_full[at.stage], at.parity);
    accumulate(sums, typename Shape::VTile{ring.v[at.stage]});
    release(&barriers.v_empty[at.stage], mixed(sums.out));
  }

 private:
  // A number that depends on all products.
  template <int kTiles>
  __device__ static uint32_t mixed(const float (&x)[Shape::kRowTiles][kTiles][4]) {
    uint32_t all = 0u;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          all ^= __float_as_uint(x[r][t][j]);
        }
      }
    }
    return all;
  }
  // The warp is done with a buffer, once `loaded` is there.
  __device__ static void release(Barrier* empty, uint32_t loaded) {
    __syncwarp();
    if (this_lane() == 0) {
      arrive_loaded(empty, loaded);
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
