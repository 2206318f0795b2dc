// The gradients of a tile of keys and values, from all rows that see them: what the backward of attention over a range
// and over listed blocks share. Transposed scores, S^T = K Q^T, put keys along the accumulator's rows: P^T and dS^T are
// then left operands of dV = P^T dO and dK = dS^T Q as they stand in the registers, and nothing is exchanged.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sm80/tile.cuh"
#include "common/softmax.cuh"

namespace nsa {

// kOutK, kOutV: columns of the gradients that one block of threads computes; kDimK / kOutK = kDimV / kOutV blocks share
// a tile whose gradients don't fit the registers together.
template <typename Element_, int kDimK_, int kDimV_, int kRows_, int kStages_, int kParts_>
struct KeyGradientsShape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kParts = kParts_;
  static constexpr int kOutK = kDimK / kParts;
  static constexpr int kOutV = kDimV / kParts;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kRows = kRows_;
  static constexpr int kStages = kStages_;
  static constexpr int kRowNumbers = 3;  // lse, delta, gate of every row of a stage
  static constexpr int kSharedBytes =
      sizeof(Element) * (kKeys + kStages * kRows) * (kDimK + kDimV) + 4 * kStages * kRows * kRowNumbers + 8 * 2 * kRows;
  static_assert(kStages <= 2);
  static_assert(kRows <= 64);  // a bit for each score of a lane
};

// A row source says which row of the tensors row number `row` is: `PlacedRow operator()(int32_t row) const`.
struct PlacedRow {
  int32_t token;  // within the tensors
  int32_t head;
};

struct KeyTile {
  const void* k;  // of the first key
  const void* v;
  int64_t k_stride;
  int64_t v_stride;
  int32_t first_key;    // within its sequence
  int32_t count;        // keys that exist, at most kKeys
  int64_t batch;        // of the rows
  int32_t to_position;  // from a row's token to its position
};

struct RowTensors {
  TensorView q, grad_out;
  RowView lse, delta, gate, grad_lse;
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

// Sums over rows [begin, end) of `place_row`. `part`: which of kParts.
template <typename Shape, typename PlaceRow>
__device__ inline void sum_key_gradients(KeyGradients<Shape>& sums, const KeyTile& tile, const RowTensors& tensors,
                                         const Visibility& visibility, float scale, int32_t begin, int32_t end,
                                         int part, unsigned char* shared, const PlaceRow& place_row) {
  using Element = typename Shape::Element;
  constexpr int kRows = Shape::kRows;
  using KTile = SharedTile<Element, Shape::kKeys, Shape::kDimK>;
  using VTile = SharedTile<Element, Shape::kKeys, Shape::kDimV>;
  using QTile = SharedTile<Element, kRows, Shape::kDimK>;
  using GradOutTile = SharedTile<Element, kRows, Shape::kDimV>;
  const KTile k_tile{reinterpret_cast<Element*>(shared)};
  const VTile v_tile{k_tile.data + KTile::kSize};
  Element* const stages = v_tile.data + VTile::kSize;
  float* const numbers = reinterpret_cast<float*>(stages + Shape::kStages * (QTile::kSize + GradOutTile::kSize));
  // Of two tiles of rows in turn: finding a row takes longer than copying it, so it is done once, a step ahead.
  PlacedRow* const placed = reinterpret_cast<PlacedRow*>(numbers + Shape::kStages * kRows * Shape::kRowNumbers);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_key = thread / 32 * 16;
  clear(sums.k[0]);
  clear(sums.v[0]);
  if (begin >= end) {
    return;
  }

  const auto place_rows = [&](int32_t first_row) {
    const int thread = fresh_thread();
    if (thread < kRows && first_row < end) {
      placed[(first_row - begin) / kRows % 2 * kRows + thread] = place_row(min(first_row + thread, end - 1));
    }
  };
  const auto copy_rows = [&](int stage, int32_t first_row) {
    const int thread = fresh_thread();
    const QTile q_tile{stages + stage * (QTile::kSize + GradOutTile::kSize)};
    const GradOutTile grad_out_tile{q_tile.data + QTile::kSize};
    const PlacedRow* const rows = placed + (first_row - begin) / kRows % 2 * kRows;
    copy_placed<Shape::kThreads>(q_tile, tensors.q, tile.batch, rows, end - first_row, thread);
    copy_placed<Shape::kThreads>(grad_out_tile, tensors.grad_out, tile.batch, rows, end - first_row, thread);
    if (thread < kRows) {
      float* const of_stage = numbers + stage * kRows * Shape::kRowNumbers + thread;
      const bool valid = first_row + thread < end;
      const PlacedRow at = rows[thread];
      copy_number(of_stage, &tensors.lse.at(tile.batch, at.head, at.token), valid);
      copy_number(of_stage + kRows, &tensors.delta.at(tile.batch, at.head, at.token), valid);
      if (tensors.gate.data != nullptr) {
        copy_number(of_stage + 2 * kRows, &tensors.gate.at(tile.batch, at.head, at.token), valid);
      } else {
        of_stage[2 * kRows] = 1.f;
      }
    }
  };

  place_rows(begin);
  place_rows(begin + kRows);
  __syncthreads();
  k_tile.template copy_consecutive<Shape::kThreads>(tile.k, tile.k_stride, tile.count, tensors.q.width, thread);
  v_tile.template copy_consecutive<Shape::kThreads>(tile.v, tile.v_stride, tile.count, tensors.grad_out.width, thread);
  copy_rows(0, begin);
  commit_copies();

  // The tokens that see the lane's two keys, and those that see all keys of the tile.
  const auto first_of = [&](int32_t key) { return visibility.first_position(key) - tile.to_position; };
  const auto last_of = [&](int32_t key) {
    return static_cast<int32_t>(min_of(int64_t{visibility.last_position(key)} - tile.to_position, 0x7fffffff));
  };
  int32_t first_token[2];
  int32_t last_token[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t key = tile.first_key + warp_key + lane / 4 + 8 * half;
    first_token[half] = first_of(key);
    last_token[half] = last_of(key);
  }
  const int32_t all_first = first_of(tile.first_key + tile.count - 1);
  const int32_t all_last = last_of(tile.first_key);
  const float scale_log2 = scale * kLog2E;

  int stage = 0;
  for (int32_t row = begin; row < end; row += kRows) {
    wait_copies<0>();
    __syncthreads();
    if (Shape::kStages == 2 && row + kRows < end) {
      copy_rows(1 - stage, row + kRows);
      commit_copies();
    }
    const QTile q_tile{stages + stage * (QTile::kSize + GradOutTile::kSize)};
    const GradOutTile grad_out_tile{q_tile.data + QTile::kSize};
    const float* const lse = numbers + stage * kRows * Shape::kRowNumbers;
    const float* const delta = lse + kRows;
    const float* const gate = delta + kRows;
    const PlacedRow* const rows = placed + (row - begin) / kRows % 2 * kRows;

    // Probabilities times gates: the weights of dO in dV, and of <dO, v> - delta in the gradients of the scores.
    float scores[1][kRows / 8][4];
    multiply_transposed(scores, k_tile, warp_key, q_tile, lane);
    float highest = 0.f;
    const bool all_seen = rows[0].token >= all_first && rows[min(kRows, end - row) - 1].token <= all_last;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 8 * i + 2 * (lane % 4) + j;
        const float offset = lse[column] * kLog2E;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& score = scores[0][i][2 * half + j];
          score = exp2_approx(fmaf(score, scale_log2, -offset));
          if (!all_seen && (rows[column].token < first_token[half] || rows[column].token > last_token[half])) {
            score = 0.f;
          }
          highest = fmaxf(highest, score);
          score *= gate[column];
        }
      }
    }
    accumulate(sums.v, scores, grad_out_tile, part * Shape::kOutV, lane);
    uint32_t whole = 0;  // a bit for each score that has all of its row's probability
    if (__any_sync(0xffffffffu, highest > kWholeProbability<Element>)) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float all = kWholeProbability<Element> * fabsf(gate[8 * i + 2 * (lane % 4) + j % 2]);
          if (fabsf(scores[0][i][j]) > all) {
            scores[0][i][j] = 0.f;
            whole |= 1u << (4 * i + j);
          }
        }
      }
    }
    // In two halves, which saves registers.
    constexpr int kHalf = kRows / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SharedTile<Element, kHalf, Shape::kDimK> q_half{q_tile.data + half * kHalf * Shape::kDimK};
      const SharedTile<Element, kHalf, Shape::kDimV> grad_out_half{grad_out_tile.data + half * kHalf * Shape::kDimV};
      float grads[1][kHalf / 8][4];
      multiply_transposed(grads, v_tile, warp_key, grad_out_half, lane);
#pragma unroll
      for (int i = 0; i < kHalf / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = half * kHalf + 8 * i + 2 * (lane % 4) + j % 2;
          grads[0][i][j] = scores[0][half * kHalf / 8 + i][j] * (grads[0][i][j] - delta[column]);
        }
      }
      if (whole != 0 && tensors.grad_lse.data != nullptr) {
#pragma unroll
        for (int i = 0; i < kHalf / 8; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if ((whole >> (4 * (half * kHalf / 8 + i) + j) & 1) != 0) {
              const PlacedRow at = rows[half * kHalf + 8 * i + 2 * (lane % 4) + j % 2];
              grads[0][i][j] = tensors.grad_lse.at(tile.batch, at.head, at.token);
            }
          }
        }
      }
      accumulate(sums.k, grads, q_half, part * Shape::kOutK, lane);
    }
    __syncthreads();
    if (Shape::kStages == 1 && row + kRows < end) {
      copy_rows(0, row + kRows);
      commit_copies();
    }
    place_rows(row + 2 * kRows);
    stage = Shape::kStages == 1 ? 0 : 1 - stage;
  }
}

// Rounds the sums into the gradients of the tile's keys; `to` is the first key's row.
template <typename Element, int kTiles>
__device__ inline void store_key_gradients(void* to, int64_t stride, int32_t count, int32_t width, int first_column,
                                           const float (&sums)[1][kTiles][4], float factor) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4 + 8 * half;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int column = first_column + 8 * i + 2 * (lane % 4);
      if (key < count && column < width) {
        *reinterpret_cast<uint32_t*>(static_cast<Element*>(to) + key * stride + column) =
            pack<Element>(sums[0][i][2 * half] * factor, sums[0][i][2 * half + 1] * factor);
      }
    }
  }
}

// The same, unrounded, into a partial sum: (kKeys, kDimK + kDimV), that of the keys first.
template <int kRowSize, int kTiles>
__device__ inline void store_partial(float* to, int first_column, const float (&sums)[1][kTiles][4], float factor) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4 + 8 * half;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int column = first_column + 8 * i + 2 * (lane % 4);
      *reinterpret_cast<float2*>(to + key * kRowSize + column) =
          make_float2(sums[0][i][2 * half] * factor, sums[0][i][2 * half + 1] * factor);
    }
  }
}

// Adds `count` partial sums that lie side by side, in their order, and rounds them into the gradients.
template <typename Shape>
__device__ inline void add_partials(const float* partials, int32_t count, void* grad_k, int64_t k_stride,
                                    int32_t k_width, void* grad_v, int64_t v_stride, int32_t v_width, int32_t keys) {
  using Element = typename Shape::Element;
  constexpr int kRowSize = Shape::kDimK + Shape::kDimV;
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kKeys * kRowSize; i += static_cast<int>(blockDim.x)) {
    const int key = i / kRowSize;
    const int column = i % kRowSize;
    const bool of_k = column < Shape::kDimK;
    if (key >= keys || (of_k ? column >= k_width : column - Shape::kDimK >= v_width)) {
      continue;
    }
    float sum = 0.f;
    for (int32_t p = 0; p < count; ++p) {
      sum += partials[static_cast<int64_t>(p) * Shape::kKeys * kRowSize + i];
    }
    if (of_k) {
      static_cast<Element*>(grad_k)[key * k_stride + column] = from_float<Element>(sum);
    } else {
      static_cast<Element*>(grad_v)[key * v_stride + column - Shape::kDimK] = from_float<Element>(sum);
    }
  }
}

}  // namespace nsa
