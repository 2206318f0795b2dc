// The gradients of a tile of keys and values, from all rows that see them: what the backward of attention over a range
// and over listed blocks share. Transposed scores, S^T = K Q^T, put keys along the accumulator's rows: P^T and dS^T are
// then left operands of dV = P^T dO and dK = dS^T Q as they stand in the registers, and nothing is exchanged.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sm80/tile.cuh"
#include "common/softmax.cuh"
#include "common/tile_dims.h"
#include "common/tiles.h"

namespace nsa {

// kOutK, kOutV: columns of the gradients that one block of threads computes; kDimK / kOutK = kDimV / kOutV blocks share
// a tile whose gradients don't fit the registers together.
template <typename Element, int kDimK, int kDimV, int kRows_, int kStages_, int kParts_>
struct KeyGradientsShape : TileDimsOf<Element, kDimK, kDimV> {
  static constexpr int kParts = kParts_;
  static constexpr int kOutK = kDimK / kParts;
  static constexpr int kOutV = kDimV / kParts;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kRows = kRows_;
  static constexpr int kStages = kStages_;
  static_assert(kKeys == kKeysPerGradientTile && kStages <= 2);
  static_assert(kRows <= 64);  // a bit for each score of a lane
};

template <typename Element, int kDimK, int kDimV>
using KeyGradientsShapeFor = KeyGradientsShape<Element, kDimK, kDimV, key_gradients_sm80::kRows,
                                               key_gradients_sm80::stages(kDimK), key_gradients_sm80::parts(kDimK)>;

// A row source says which row of the tensors row number `row` is: `PlacedRow operator()(int32_t row) const`.
struct PlacedRow {
  int32_t token;  // within the tensors
  int32_t head;
};
static_assert(sizeof(PlacedRow) == key_gradients_sm80::kPlaceBytes);

struct KeyTile {
  const void* k;  // of the first key
  const void* v;
  int64_t k_stride;
  int64_t v_stride;
  int32_t first_key;    // within its sequence
  int32_t count;        // keys that exist, at most kKeys
  int64_t batch;        // of the rows
  int32_t to_position;  // from a row's token to its position

  // Keys [first_key, first_key + count) of a sequence whose keys lie from `begin` on.
  template <typename Element, typename Params>
  static __device__ KeyTile of(const Params& params, const SequencePlace& place, int64_t begin, int32_t first_key,
                               int32_t count, int32_t head_kv) {
    return {params.k.template row<Element>(place.batch, begin + first_key, head_kv),
            params.v.template row<Element>(place.batch, begin + first_key, head_kv),
            params.k.token_stride,
            params.v.token_stride,
            first_key,
            count,
            place.batch,
            static_cast<int32_t>(place.offset - place.q_begin)};
  }
};

struct RowTensors {
  TensorView q, grad_out;
  RowView lse, delta, gate, grad_lse;

  template <typename Params>
  __device__ explicit RowTensors(const Params& params)
      : q(params.q),
        grad_out(params.grad_out),
        lse(params.lse),
        delta(params.delta),
        gate(params.gate),
        grad_lse(params.grad_lse) {}
};

template <typename Shape>
struct KeyGradients {
  float k[1][Shape::kOutK / 8][4];
  float v[1][Shape::kOutV / 8][4];
};

// Starts to copy the rows of a tile that `rows` names, the first `count` of them. A thread copies the same chunk of
// every so many rows.
template <int kThreads, typename Tile>
__device__ inline void copy_placed(const Tile& to, const TensorView& from, int64_t batch, const PlacedRow* rows,
                                   int count, int thread) {
  using Element = typename Tile::Element;
  const char* const base = static_cast<const char*>(from.data) + batch * from.batch_stride * int64_t{sizeof(Element)};
  const int64_t token_stride = from.token_stride * int64_t{sizeof(Element)};
  const int64_t head_stride = from.head_stride * int64_t{sizeof(Element)};
  constexpr int kStep = kThreads / Tile::kChunks;
  if constexpr (kThreads % Tile::kChunks == 0 && kStep % 8 == 0) {  // the chunk's place is then the same in all rows
    const int index = thread % Tile::kChunks;
    const int first = thread / Tile::kChunks;
    Element* chunk = to.chunk(first, index);
    const bool exists = index * kChunk < from.width;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kStep; ++i) {
      const PlacedRow at = rows[first + i * kStep];
      const char* const row = base + at.token * token_stride + at.head * head_stride + index * 16;
      copy_async(chunk + i * kStep * Tile::kColumns, row, exists && first + i * kStep < count);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < Tile::kRows * Tile::kChunks; i += kThreads) {
      const int row = i / Tile::kChunks;
      const int index = i % Tile::kChunks;
      const PlacedRow at = rows[row];
      const bool valid = row < count && index * kChunk < from.width;
      copy_async(to.chunk(row, index),
                 valid ? base + at.token * token_stride + at.head * head_stride + index * 16 : base, valid);
    }
  }
}

// The shared memory of a block of threads: its tile of keys, the stages of rows, what each row brings, and where the
// rows of two tiles in turn stand.
template <typename Shape>
struct KeyGradientsTiles {
  using Element = typename Shape::Element;
  static constexpr int kRows = Shape::kRows;
  static constexpr int kRowNumbers = key_gradients_sm80::kRowNumbers;
  using KTile = SharedTile<Element, Shape::kKeys, Shape::kDimK>;
  using VTile = SharedTile<Element, Shape::kKeys, Shape::kDimV>;
  using QTile = SharedTile<Element, kRows, Shape::kDimK>;
  using GradOutTile = SharedTile<Element, kRows, Shape::kDimV>;

  KTile k;
  VTile v;
  Element* stages;
  float* numbers;
  // Finding a row takes longer than copying it, so it is done once, a step ahead.
  PlacedRow* all_placed;

  __device__ explicit KeyGradientsTiles(unsigned char* shared)
      : k{reinterpret_cast<Element*>(shared)}, v{k.data + KTile::kSize}, stages(v.data + VTile::kSize) {
    numbers = reinterpret_cast<float*>(stages + Shape::kStages * (QTile::kSize + GradOutTile::kSize));
    all_placed = reinterpret_cast<PlacedRow*>(numbers + Shape::kStages * kRows * kRowNumbers);
  }
  __device__ QTile q(int stage) const { return {stages + stage * (QTile::kSize + GradOutTile::kSize)}; }
  __device__ GradOutTile grad_out(int stage) const { return {q(stage).data + QTile::kSize}; }
  __device__ float* lse(int stage) const { return numbers + stage * kRows * kRowNumbers; }
  __device__ float* delta(int stage) const { return lse(stage) + kRows; }
  __device__ float* gate(int stage) const { return lse(stage) + 2 * kRows; }
  __device__ PlacedRow* placed(int32_t tile) const { return all_placed + tile % 2 * kRows; }
};

// Copies rows [begin, end) of `place_row`, a tile of them at a time.
template <typename Shape, typename PlaceRow>
struct KeyGradientsFeed {
  static constexpr int kRows = Shape::kRows;

  const KeyGradientsTiles<Shape>& tiles;
  const RowTensors& tensors;
  int64_t batch;
  int32_t begin;
  int32_t end;
  const PlaceRow& place_row;

  __device__ PlacedRow* placed(int32_t first_row) const { return tiles.placed((first_row - begin) / kRows); }
  __device__ void place(int32_t first_row) const {
    const int thread = fresh_thread();
    if (thread < kRows && first_row < end) {
      placed(first_row)[thread] = place_row(min(first_row + thread, end - 1));
    }
  }
  __device__ void copy(int stage, int32_t first_row) const {
    const int thread = fresh_thread();
    const PlacedRow* const rows = placed(first_row);
    copy_placed<Shape::kThreads>(tiles.q(stage), tensors.q, batch, rows, end - first_row, thread);
    copy_placed<Shape::kThreads>(tiles.grad_out(stage), tensors.grad_out, batch, rows, end - first_row, thread);
    if (thread < kRows) {
      const bool valid = first_row + thread < end;
      const PlacedRow at = rows[thread];
      copy_number(tiles.lse(stage) + thread, &tensors.lse.at(batch, at.head, at.token), valid);
      copy_number(tiles.delta(stage) + thread, &tensors.delta.at(batch, at.head, at.token), valid);
      if (tensors.gate.data != nullptr) {
        copy_number(tiles.gate(stage) + thread, &tensors.gate.at(batch, at.head, at.token), valid);
      } else {
        tiles.gate(stage)[thread] = 1.f;
      }
    }
    commit_copies();
  }
};

// The tokens that see the lane's two keys, and those that see all keys of the tile.
struct TokensSeeing {
  int32_t first[2];
  int32_t last[2];
  int32_t all_first;
  int32_t all_last;

  __device__ TokensSeeing(const Visibility& visibility, const KeyTile& tile) {
    const auto first_of = [&](int32_t key) { return visibility.first_position(key) - tile.to_position; };
    const auto last_of = [&](int32_t key) {
      return static_cast<int32_t>(min_of(int64_t{visibility.last_position(key)} - tile.to_position, 0x7fffffff));
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t key = tile.first_key + this_warp() * 16 + this_lane() / 4 + 8 * half;
      first[half] = first_of(key);
      last[half] = last_of(key);
    }
    all_first = first_of(tile.first_key + tile.count - 1);
    all_last = last_of(tile.first_key);
  }
};

// The row that column j of 8 columns `i` of a lane's scores belongs to.
__device__ inline int row_of_score(int i, int j) { return 8 * i + 2 * (this_lane() % 4) + j % 2; }

// Scores to probabilities times gates: the weights of dO in dV, and of <dO, v> - delta in the gradients of the scores.
// Returns the highest probability.
template <int kRows>
__device__ inline float weigh_rows(float (&scores)[kRows / 8][4], const float* lse, const float* gate,
                                   const PlacedRow* rows, int32_t count, const TokensSeeing& seeing, float scale_log2) {
  float highest = 0.f;
  const bool all_seen = rows[0].token >= seeing.all_first && rows[min(kRows, count) - 1].token <= seeing.all_last;
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = row_of_score(i, j);
      const float offset = lse[row] * kLog2E;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& score = scores[i][2 * half + j];
        score = exp2_approx(fmaf(score, scale_log2, -offset));
        if (!all_seen && (rows[row].token < seeing.first[half] || rows[row].token > seeing.last[half])) {
          score = 0.f;
        }
        highest = fmaxf(highest, score);
        score *= gate[row];
      }
    }
  }
  return highest;
}

// Clears the scores that have all of their row's probability. Returns a bit for each.
template <typename Element, int kTiles>
__device__ inline uint32_t take_whole(float (&scores)[kTiles][4], const float* gate) {
  uint32_t whole = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float all = kWholeProbability<Element> * fabsf(gate[row_of_score(i, j)]);
      if (fabsf(scores[i][j]) > all) {
        scores[i][j] = 0.f;
        whole |= 1u << (4 * i + j);
      }
    }
  }
  return whole;
}

// Of kHalf rows: grads, which hold <dO, v>, become the gradients of the scores. `whole` has a bit for each.
template <int kTiles>
__device__ inline void grad_scores(float (&grads)[kTiles][4], const float (*scores)[4], const float* delta,
                                   uint32_t whole, const PlacedRow* rows, const RowView& grad_lse, int64_t batch) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      grads[i][j] = scores[i][j] * (grads[i][j] - delta[row_of_score(i, j)]);
    }
  }
  if (whole != 0 && grad_lse.data != nullptr) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((whole >> (4 * i + j) & 1) != 0) {
          const PlacedRow at = rows[row_of_score(i, j)];
          grads[i][j] = grad_lse.at(batch, at.head, at.token);
        }
      }
    }
  }
}

// Adds what the rows of one stage, `count` of which exist, bring to the sums.
template <typename Shape>
__device__ inline void add_rows(KeyGradients<Shape>& sums, const KeyGradientsTiles<Shape>& tiles, int stage,
                                const PlacedRow* rows, int32_t count, const TokensSeeing& seeing,
                                const RowTensors& tensors, int64_t batch, float scale_log2, int part) {
  using Element = typename Shape::Element;
  constexpr int kRows = Shape::kRows;
  const int lane = this_lane();
  const int warp_key = this_warp() * 16;
  const float* const gate = tiles.gate(stage);
  float scores[1][kRows / 8][4];
  multiply_transposed(scores, tiles.k, warp_key, tiles.q(stage), lane);
  const float highest = weigh_rows<kRows>(scores[0], tiles.lse(stage), gate, rows, count, seeing, scale_log2);
  accumulate(sums.v, scores, tiles.grad_out(stage), part * Shape::kOutV, lane);
  uint32_t whole = 0;
  if (__any_sync(0xffffffffu, highest > kWholeProbability<Element>)) {
    whole = take_whole<Element>(scores[0], gate);
  }
  // In two halves, which saves registers.
  constexpr int kHalf = kRows / 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = half * kHalf;
    const SharedTile<Element, kHalf, Shape::kDimK> q_half{tiles.q(stage).data + first * Shape::kDimK};
    const SharedTile<Element, kHalf, Shape::kDimV> grad_out_half{tiles.grad_out(stage).data + first * Shape::kDimV};
    float grads[1][kHalf / 8][4];
    multiply_transposed(grads, tiles.v, warp_key, grad_out_half, lane);
    grad_scores(grads[0], scores[0] + first / 8, tiles.delta(stage) + first, whole >> (4 * (first / 8)), rows + first,
                tensors.grad_lse, batch);
    accumulate(sums.k, grads, q_half, part * Shape::kOutK, lane);
  }
}

// Sums over rows [begin, end) of `place_row`. `part`: which of kParts.
template <typename Shape, typename PlaceRow>
__device__ inline void sum_key_gradients(KeyGradients<Shape>& sums, const KeyTile& tile, const RowTensors& tensors,
                                         const Visibility& visibility, float scale, int32_t begin, int32_t end,
                                         int part, unsigned char* shared, const PlaceRow& place_row) {
  constexpr int kRows = Shape::kRows;
  const KeyGradientsTiles<Shape> tiles(shared);
  const KeyGradientsFeed<Shape, PlaceRow> feed{tiles, tensors, tile.batch, begin, end, place_row};
  const int thread = static_cast<int>(threadIdx.x);
  clear(sums.k[0]);
  clear(sums.v[0]);
  if (begin >= end) {
    return;
  }
  feed.place(begin);
  feed.place(begin + kRows);
  __syncthreads();
  tiles.k.template copy_consecutive<Shape::kThreads>(tile.k, tile.k_stride, tile.count, tensors.q.width, thread);
  tiles.v.template copy_consecutive<Shape::kThreads>(tile.v, tile.v_stride, tile.count, tensors.grad_out.width, thread);
  feed.copy(0, begin);
  const TokensSeeing seeing(visibility, tile);
  const float scale_log2 = scale * kLog2E;

  int stage = 0;
  for (int32_t row = begin; row < end; row += kRows) {
    wait_copies<0>();
    __syncthreads();
    if (Shape::kStages == 2 && row + kRows < end) {
      feed.copy(1 - stage, row + kRows);
    }
    add_rows<Shape>(sums, tiles, stage, feed.placed(row), end - row, seeing, tensors, tile.batch, scale_log2, part);
    __syncthreads();
    if (Shape::kStages == 1 && row + kRows < end) {
      feed.copy(0, row + kRows);
    }
    feed.place(row + 2 * kRows);
    stage = Shape::kStages == 1 ? 0 : 1 - stage;
  }
}

}  // namespace nsa
