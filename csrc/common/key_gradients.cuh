// The gradients of a tile of keys and values, from all rows that see them: what the backward of attention over a range and
// over listed blocks share. Transposed scores, S^T = K Q^T, put keys along the accumulator's rows: P^T and dS^T are then
// left operands of dV = P^T dO and dK = dS^T Q as they stand in the registers, and nothing is exchanged.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "common/tile.cuh"

namespace nsa {

// kOutK, kOutV: columns of the gradients that one block of threads computes; kDimK / kOutK = kDimV / kOutV blocks share a
// tile whose gradients don't fit the registers together.
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
  static constexpr int kRowNumbers = 4;  // lse, delta, gate, position of every row of a stage
  static constexpr int kSharedBytes =
      sizeof(Element) * (kKeys + kStages * kRows) * (kDimK + kDimV) + 4 * kStages * kRows * kRowNumbers;
  static_assert(kStages <= 2);
};

// One key tile and the tensors its rows are read from. A row source, given a row's number, says which row of the tensors
// it is: `PlacedRow operator()(int32_t row) const`.
struct PlacedRow {
  int64_t batch;
  int64_t token;  // within the tensors
  int32_t head;
  int32_t position;
};

struct KeyTile {
  const void* k;  // of the first key
  const void* v;
  int64_t k_stride;
  int64_t v_stride;
  int32_t first_key;  // within its sequence
  int32_t count;      // keys that exist, at most kKeys
};

struct RowTensors {
  TensorView q, grad_out;
  RowView lse, delta, gate;
};

template <typename Shape>
struct KeyGradients {
  float k[1][Shape::kOutK / 8][4];
  float v[1][Shape::kOutV / 8][4];
};

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
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_key = thread / 32 * 16;
  clear(sums.k[0]);
  clear(sums.v[0]);
  if (begin >= end) {
    return;
  }

  const auto copy_rows = [&](int stage, int32_t first_row) {
    const QTile q_tile{stages + stage * (QTile::kSize + GradOutTile::kSize)};
    const GradOutTile grad_out_tile{q_tile.data + QTile::kSize};
    const auto source = [&](const TensorView& from) {
      return [&, from](int row) -> const Element* {
        if (first_row + row >= end) {
          return nullptr;
        }
        const PlacedRow at = place_row(first_row + row);
        return from.row<Element>(at.batch, at.token, at.head);
      };
    };
    q_tile.copy_rows(tensors.q.width, tensors.q.data, thread, Shape::kThreads, source(tensors.q));
    grad_out_tile.copy_rows(tensors.grad_out.width, tensors.grad_out.data, thread, Shape::kThreads,
                            source(tensors.grad_out));
    if (thread < kRows) {
      float* const of_stage = numbers + stage * kRows * Shape::kRowNumbers + thread;
      const bool valid = first_row + thread < end;
      const PlacedRow at = place_row(valid ? first_row + thread : end - 1);
      copy_number(of_stage, &tensors.lse.at(at.batch, at.head, at.token), valid);
      copy_number(of_stage + kRows, &tensors.delta.at(at.batch, at.head, at.token), valid);
      if (tensors.gate.data != nullptr) {
        copy_number(of_stage + 2 * kRows, &tensors.gate.at(at.batch, at.head, at.token), valid);
      } else {
        of_stage[2 * kRows] = 1.f;
      }
      of_stage[3 * kRows] = __int_as_float(at.position);
    }
  };

  k_tile.template copy_consecutive<Shape::kThreads>(tile.k, tile.k_stride, tile.count, tensors.q.width, thread);
  v_tile.template copy_consecutive<Shape::kThreads>(tile.v, tile.v_stride, tile.count, tensors.grad_out.width, thread);
  copy_rows(0, begin);
  commit_copies();

  // The positions that see the lane's two keys, and those that see all keys of the tile.
  int32_t first_position[2];
  int32_t last_position[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t key = tile.first_key + warp_key + lane / 4 + 8 * half;
    first_position[half] = visibility.first_position(key);
    last_position[half] = visibility.last_position(key);
  }
  const int32_t all_first = visibility.first_position(tile.first_key + tile.count - 1);
  const int32_t all_last = visibility.last_position(tile.first_key);
  const float scale_log2 = scale * kLog2E;

  int stage = 0;
  for (int32_t row = begin; row < end; row += kRows) {
    if (Shape::kStages == 2 && row + kRows < end) {
      copy_rows(1 - stage, row + kRows);
    }
    commit_copies();
    wait_copies<Shape::kStages - 1>();
    __syncthreads();
    const QTile q_tile{stages + stage * (QTile::kSize + GradOutTile::kSize)};
    const GradOutTile grad_out_tile{q_tile.data + QTile::kSize};
    const float* const lse = numbers + stage * kRows * Shape::kRowNumbers;
    const float* const delta = lse + kRows;
    const float* const gate = delta + kRows;
    const int32_t* const position = reinterpret_cast<const int32_t*>(gate + kRows);

    float scores[1][kRows / 8][4];
    multiply_transposed(scores, k_tile, warp_key, q_tile, lane);
    const bool all_seen = position[0] >= all_first && position[min(kRows, end - row) - 1] <= all_last;
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
          if (!all_seen && (position[column] < first_position[half] || position[column] > last_position[half])) {
            score = 0.f;
          }
        }
      }
    }
    // dV takes probability times gate; the gradients of the scores take the probability.
    float grads[1][kRows / 8][4];
    if (tensors.gate.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          grads[0][i][j] = scores[0][i][j] * gate[8 * i + 2 * (lane % 4) + j % 2];
        }
      }
      accumulate(sums.v, grads, grad_out_tile, part * Shape::kOutV, lane);
    } else {
      accumulate(sums.v, scores, grad_out_tile, part * Shape::kOutV, lane);
    }
    multiply_transposed(grads, v_tile, warp_key, grad_out_tile, lane);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = 8 * i + 2 * (lane % 4) + j % 2;
        scores[0][i][j] *= fmaf(gate[column], grads[0][i][j], -delta[column]);
      }
    }
    accumulate(sums.k, scores, q_tile, part * Shape::kOutK, lane);
    __syncthreads();
    if (Shape::kStages == 1 && row + kRows < end) {
      copy_rows(0, row + kRows);
    }
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
__device__ inline void add_partials(const float* partials, int32_t count, void* grad_k, int64_t k_stride, int32_t k_width,
                                    void* grad_v, int64_t v_stride, int32_t v_width, int32_t keys) {
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
