// The gradients of 64 keys and their values, from rows (queries of one head) that pass by in shared memory, by one
// warpgroup of Hopper: what the backward of attention over a range and over listed blocks share.
//   S^T = K Q^T        P^T = exp(scale S^T - lse)                   dV += (gate P^T) dO
//   D^T = V dO^T       dS^T = gate P^T (D^T - delta)                dK += dS^T Q, times scale at the end
// Keys are the rows of the transposed scores, so the accumulators of S^T and D^T, rounded, are left operands of the
// sums as they stand in registers. All that a step reads from shared memory is K, V, its rows of Q and dO, each both
// along and across, and three numbers a row.
//
// A step starts S^T and D^T together and takes P^T while D^T runs, and dS^T while dV runs. The products of one
// warpgroup run under what another computes.
#pragma once

#include "common/params.h"
#include "common/rows.cuh"
#include "common/sm80/tile.cuh"
#include "common/sm90/products.cuh"

namespace nsa {

template <typename Element_, int kDimK_, int kDimV_, int kRows_, int kStages_>
struct KeyGradientsSm90Shape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kKeys = 64;  // of a warpgroup
  static constexpr int kRows = kRows_;
  static constexpr int kStages = kStages_;
  static constexpr int kProducerRegisters = kDimK <= 64 ? 56 : 40;
  static constexpr int kConsumerRegisters = kDimK <= 64 ? 224 : 232;
  using KTile = PanelTile<Element, kKeys, kDimK>;
  using VTile = PanelTile<Element, kKeys, kDimV>;
  using QTile = PanelTile<Element, kRows, kDimK>;
  using GradOutTile = PanelTile<Element, kRows, kDimV>;
  static constexpr int kRowBytes = (QTile::kSize + GradOutTile::kSize) * 2;  // of a step
  static constexpr int kKeyBytes = (KTile::kSize + VTile::kSize) * 2;
};

// What a step needs to know of its rows. Rows that take no part have lse = inf, so that their probabilities are 0, and
// the position of the last that does.
template <int kRows>
struct RowNumbers {
  alignas(16) float2 weights[kRows];  // log2(e) lse, gate
  alignas(8) float delta[kRows];
  alignas(8) int32_t position[kRows];  // ascending or descending
};

// The rows of a few steps, filled by the copies of one thread and the numbers of a warp, drained by consumers. Each
// thread that writes or reads numbers arrives for itself.
template <typename Shape>
struct RowRing {
  alignas(1024) typename Shape::Element q[Shape::kStages][Shape::QTile::kSize];
  alignas(1024) typename Shape::Element grad_out[Shape::kStages][Shape::GradOutTile::kSize];
  RowNumbers<Shape::kRows> numbers[Shape::kStages];
  Barrier full[Shape::kStages], empty[Shape::kStages];

  __device__ void init_barriers(int consumers) {
    for (int i = 0; i < Shape::kStages; ++i) {
      init_barrier(&full[i], 1 + 32);  // the thread that copies, and the warp that gathers numbers
      init_barrier(&empty[i], consumers * kWarpgroup);
    }
  }
};

// Sets rows that no copy ever fills to 0.
template <typename Shape>
__device__ inline void clear_rows(RowRing<Shape>& ring, int first_row, int thread, int threads) {
  for (int i = first_row * 8 + thread; i < Shape::kRows * 8; i += threads) {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      for (int panel = 0; panel < Shape::QTile::kPanels; ++panel) {
        reinterpret_cast<uint4*>(ring.q[stage] + panel * Shape::QTile::kPanelSize)[i] = uint4{};
      }
      for (int panel = 0; panel < Shape::GradOutTile::kPanels; ++panel) {
        reinterpret_cast<uint4*>(ring.grad_out[stage] + panel * Shape::GradOutTile::kPanelSize)[i] = uint4{};
      }
    }
  }
}

// A warpgroup's keys, and where rows lie.
struct KeyGradientsPlace {
  int32_t first_key;  // within its sequence
  int32_t count;      // keys that exist, of 64
  int32_t batch;      // of the rows
  int32_t to_token;   // from a row's position to its token
  int32_t first_head;
};

template <typename Shape>
struct KeyGradientSums {
  float k[Shape::kDimK / 8][4];
  float v[Shape::kDimV / 8][4];
};

// Gives scores of rows that do not see a key a probability of 0.
template <int kRows, int kTiles>
__device__ inline void hide_unseen(float (&scores)[kTiles][4], const RowNumbers<kRows>& numbers,
                                   const KeyGradientsPlace& place, const Visibility& visibility, float scale,
                                   int lane) {
  const int first_key = place.first_key + fresh_thread() % kWarpgroup / 32 * 16 + lane / 4;
  int32_t first[2];
  uint32_t most[2];  // positions after the first that see the key
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    first[half] = visibility.first_position(first_key + 8 * half);
    most[half] = static_cast<uint32_t>(visibility.last_position(first_key + 8 * half) - first[half]);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int2 positions = reinterpret_cast<const int2*>(numbers.position)[4 * i + lane % 4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t position = j % 2 == 0 ? positions.x : positions.y;
      if (static_cast<uint32_t>(position - first[j / 2]) > most[j / 2]) {
        scores[i][j] = scale > 0.f ? kMinusInfinity : -kMinusInfinity;
      }
    }
  }
}

// Starts to = keys times rows, transposed. Both descriptors are of whole tiles.
template <typename Keys, typename Rows, int kTiles>
__device__ inline void start_scores(float (&to)[kTiles][4], uint64_t keys, uint64_t rows) {
#pragma unroll
  for (int column = 0; column < Keys::kColumns; column += 16) {
    const int panel = column / 64;
    const int inside = column % 64;
    const uint64_t of_keys = advance(keys, 2 * (panel * Keys::kPanelSize + inside));
    const uint64_t of_rows = advance(rows, 2 * (panel * Rows::kPanelSize + inside));
    if (column == 0) {
      multiply_first<typename Keys::Element>(to, of_keys, of_rows);
    } else {
      multiply_async<typename Keys::Element>(to, of_keys, of_rows, true);
    }
  }
  commit_products();
}

// Starts to += left times rows.
template <typename Element, int kTiles, int kSteps>
__device__ inline void start_sums(float (&to)[kTiles][4], const uint32_t (&left)[kSteps][4], uint64_t rows) {
  hold(to);
  fence_products();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    multiply_async<Element>(to, left[i], advance(rows, 2 * 64 * 16 * i), true);
  }
  commit_products();
}

// What a caller may do with the gradients of a step's scores, left operands: here nothing. keep(gradients) is called
// before they are multiplied, send(stage of the ring) while they are.
struct HandsNothingOver {
  template <int kSteps>
  __device__ void keep(const uint32_t (&)[kSteps][4]) const {}
  __device__ void send(int) const {}
};

// Sums over `steps` steps of the ring. K and V are whole in shared memory. Each thread releases what it has read.
template <typename Shape, typename HandOver = HandsNothingOver>
__device__ inline void sum_key_gradients(KeyGradientSums<Shape>& sums, RowRing<Shape>& ring,
                                         RingPlace<Shape::kStages>& ring_place, const typename Shape::Element* k_data,
                                         const typename Shape::Element* v_data, const KeyGradientsPlace& place,
                                         const Visibility& visibility, float scale, const SequenceLayout& sequences,
                                         const RowView& grad_lse, int32_t steps, HandOver&& hand_over = HandOver()) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  constexpr int kRows = Shape::kRows;
  clear(sums.k);
  clear(sums.v);
  if (steps <= 0) {
    return;
  }

  const uint64_t k_at = tile_descriptor(shared_address(k_data), 0);
  const uint64_t v_at = tile_descriptor(shared_address(v_data), 0);
  const uint64_t q_at = tile_descriptor(shared_address(ring.q), QTile::kPanelSize * sizeof(Element));
  const uint64_t grad_out_at =
      tile_descriptor(shared_address(ring.grad_out), GradOutTile::kPanelSize * sizeof(Element));
  const float scale_log2 = scale * kLog2E;

  float scores[kRows / 8][4];
  float grads[kRows / 8][4];
  uint32_t weights[kRows / 16][4];
  uint32_t score_grads[kRows / 16][4];

#pragma unroll 1
  for (; steps > 0; --steps) {
    const int stage = ring_place.stage;
    wait(&ring.full[stage], ring_place.parity);
    const uint64_t q = advance(q_at, stage * QTile::kSize * 2);
    const uint64_t grad_out = advance(grad_out_at, stage * GradOutTile::kSize * 2);
    fence_products();
    start_scores<typename Shape::KTile, QTile>(scores, k_at, q);
    start_scores<typename Shape::VTile, GradOutTile>(grads, v_at, grad_out);

    const int lane = fresh_thread() % 32;
    const RowNumbers<kRows>& numbers = ring.numbers[stage];
    const int32_t of_ends[2] = {numbers.position[0], numbers.position[kRows - 1]};
    // Positions that see all keys.
    const int32_t all_first = visibility.first_position(place.first_key + place.count - 1);
    const int32_t all_last = visibility.last_position(place.first_key);
    const bool all_seen = min(of_ends[0], of_ends[1]) >= all_first && max(of_ends[0], of_ends[1]) <= all_last;
    wait_products<1>();
    hold(scores);
    if (!all_seen) {
      hide_unseen(scores, numbers, place, visibility, scale, lane);
    }

    // Probabilities times gates: the weights of dO in dV, and of <dO, v> - delta in the gradients of the scores.
    float highest = 0.f;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float4 of_rows = reinterpret_cast<const float4*>(numbers.weights)[4 * i + lane % 4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = exp2_approx(fmaf(scores[i][2 * half], scale_log2, -of_rows.x));
        const float second = exp2_approx(fmaf(scores[i][2 * half + 1], scale_log2, -of_rows.z));
        highest = fmaxf(highest, fmaxf(first, second));
        scores[i][2 * half] = first * of_rows.y;
        scores[i][2 * half + 1] = second * of_rows.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      as_left<Element>(weights[i], scores, i);
    }
    start_sums<Element>(sums.v, weights, grad_out);

    wait_products<1>();
    hold(grads);
    const int lane_again = fresh_thread() % 32;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float2 delta = reinterpret_cast<const float2*>(numbers.delta)[4 * i + lane_again % 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        grads[i][j] = scores[i][j] * (grads[i][j] - (j % 2 == 0 ? delta.x : delta.y));
      }
    }
    // A key with all of a row's probability: the gradient of its score is that of lse.
    if (__any_sync(0xffffffffu, highest > kWholeProbability<Element>)) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = 8 * i + 2 * (lane_again % 4) + j % 2;
          if (fabsf(scores[i][j]) > kWholeProbability<Element> * fabsf(numbers.weights[row].y)) {
            grads[i][j] = grad_lse.data == nullptr
                              ? 0.f
                              : grad_lse.at(place.batch, place.first_head + row_at(sequences, 0, row).head,
                                            numbers.position[row] + place.to_token);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      as_left<Element>(score_grads[i], grads, i);
    }
    hand_over.keep(score_grads);
    start_sums<Element>(sums.k, score_grads, q);
    hand_over.send(stage);
    wait_products<0>();
    hold(sums.k);
    hold(sums.v);
    arrive(&ring.empty[stage]);
    ring_place.advance();
  }
}

// Passes over steps in which the consumer has no part.
template <typename Shape>
__device__ inline void skip_steps(RowRing<Shape>& ring, RingPlace<Shape::kStages>& place, int32_t steps) {
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    wait(&ring.full[place.stage], place.parity);
    arrive(&ring.empty[place.stage]);
    place.advance();
  }
}

// Calls store(key, column, first, second) with each pair of neighbouring columns of a warpgroup's sums.
template <int kTiles, typename Store>
__device__ inline void for_each_pair(const float (&sums)[kTiles][4], const Store& store) {
  const int thread = fresh_thread() % kWarpgroup;
  const int lane = thread % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = thread / 32 * 16 + lane / 4 + 8 * half;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      store(key, 8 * i + 2 * (lane % 4), sums[i][2 * half], sums[i][2 * half + 1]);
    }
  }
}

// Rounds the sums into the gradients of `count` keys; `to` is the first key's row.
template <typename Element, int kTiles>
__device__ inline void store_gradients(Element* to, int64_t stride, int32_t count, int32_t width,
                                       const float (&sums)[kTiles][4], float factor) {
  for_each_pair(sums, [&](int key, int column, float first, float second) {
    if (key < count && column < width) {
      *reinterpret_cast<uint32_t*>(to + key * stride + column) = pack<Element>(first * factor, second * factor);
    }
  });
}

// The same, unrounded, into a partial sum: (64 keys, kDimK + kDimV), that of the keys first.
template <typename Shape>
__device__ inline void store_partial_sums(float* to, const KeyGradientSums<Shape>& sums, float factor_k,
                                          float factor_v) {
  constexpr int kRowSize = Shape::kDimK + Shape::kDimV;
  for_each_pair(sums.k, [&](int key, int column, float first, float second) {
    *reinterpret_cast<float2*>(to + key * kRowSize + column) = make_float2(first * factor_k, second * factor_k);
  });
  for_each_pair(sums.v, [&](int key, int column, float first, float second) {
    *reinterpret_cast<float2*>(to + key * kRowSize + Shape::kDimK + column) =
        make_float2(first * factor_v, second * factor_v);
  });
}

}  // namespace nsa
