// The gradients of 64 keys over rows that pass by, as common/sm90/key_gradients.cuh, for a warpgroup that shares its
// rows with another: shared memory, and with it what arithmetic loads from there, is busy with both one's products, so
// that arithmetic is long and needs products beside it.
//
// A step finds S^T there and dK of the step before under way, takes P^T, starts V dO^T into the same registers, then dV
// += P^T dO; takes dS^T under dV; and when dV is done starts the next step's S^T, and dK += dS^T Q behind it.
#pragma once

#include "common/sm90/key_gradients.cuh"

namespace nsa {

// Numbers of rows are such that a probability comes out times kWholeFactor, and from 2 on where it is a whole one: then
// bit 30 of it is set, and of no smaller one.
template <typename Element>
constexpr float kWholeFactor = 2.f / kWholeProbability<Element>;
constexpr uint32_t kFromTwoOn = 1u << 30;
// Times which weights are rounded, and V dO^T - delta divided by it: of a few thousand keys a gated probability may be
// among the least numbers of float16.
template <typename Element>
constexpr float kWeightScale = __is_same(Element, BFloat16) ? 1.f : 256.f;

// dS^T of two rows from what was rounded of P^T and from V dO^T - delta.
template <typename Element>
__device__ inline uint32_t score_gradients(uint32_t weights, float first, float second) {
  if constexpr (__is_same(Element, BFloat16)) {
    const uint32_t rounded = pack<Element>(first, second);
    uint32_t product;
    asm("mul.rn.bf16x2 %0, %1, %2;\n" : "=r"(product) : "r"(weights), "r"(rounded));
    return product;
  } else {
    const float2 weight = __half22float2(*reinterpret_cast<const __half2*>(&weights));
    return pack<Element>(weight.x * first, weight.y * second);
  }
}

// Sums over `steps` steps of the ring, the first of which begins at `position`, each of `step_queries` queries. K and V
// are whole in shared memory. Each thread releases what it has read. The sums of dV come out times kWeightScale.
template <typename Shape>
__device__ inline void sum_range_key_gradients(KeyGradientSums<Shape>& sums, RowRing<Shape>& ring,
                                               RingPlace<Shape::kStages>& ring_place,
                                               const typename Shape::Element* k_data,
                                               const typename Shape::Element* v_data, const KeyGradientsPlace& place,
                                               const RangeBackwardParams& range, int32_t position, int32_t step_queries,
                                               int32_t steps) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  constexpr int kRows = Shape::kRows;
  constexpr int kMasks = (kRows + 63) / 64;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  clear(sums.k);
  clear(sums.v);
  if (steps <= 0) {
    return;
  }
  // Zeros that were written after a product has begun would be taken for a conflict with it.
  hold(sums.k);
  hold(sums.v);

  const uint64_t k_at = tile_descriptor(shared_address(k_data), 0);
  const uint64_t v_at = tile_descriptor(shared_address(v_data), 0);
  const uint64_t q_at = tile_descriptor(shared_address(ring.q), QTile::kPanelSize * sizeof(Element));
  const uint64_t grad_out_at =
      tile_descriptor(shared_address(ring.grad_out), GradOutTile::kPanelSize * sizeof(Element));
  const float scale_log2 = range.scale * kLog2E;
  // Positions that see all keys.
  const int32_t all_first = range.visibility.first_position(place.first_key + place.count - 1);
  const int32_t all_last = range.visibility.last_position(place.first_key);

  float scores[kRows / 8][4];  // S^T, P^T, V dO^T, V dO^T - delta
  uint32_t weights[kRows / 16][4];
  uint32_t score_grads[kRows / 16][4];

  wait(&ring.full[ring_place.stage], ring_place.parity);
  fence_products();
  start_scores<typename Shape::KTile, QTile>(scores, k_at, advance(q_at, ring_place.stage * QTile::kSize * 2));
  wait_products<0>();
  hold(scores);
  int last_stage = -1;  // whose Q is still read
  const int32_t end_position = position + steps * step_queries;
#pragma unroll 1
  while (position < end_position) {
    const int stage = ring_place.stage;
    const RowNumbers<kRows>& numbers = ring.numbers[stage];
    if (position < all_first || position + step_queries - 1 > all_last) {
      hide_unseen(scores, numbers, place, range.visibility, range.scale, lane);
    }
    position += step_queries;

    // Probabilities times gates: the weights of dO in dV, and of <dO, v> - delta in the gradients of the scores.
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float4 of_rows = reinterpret_cast<const float4*>(numbers.weights)[4 * i + lane % 4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = exp2_approx(fmaf(scores[i][2 * half], scale_log2, -of_rows.x));
        const float second = exp2_approx(fmaf(scores[i][2 * half + 1], scale_log2, -of_rows.z));
        bits |= __float_as_uint(first) | __float_as_uint(second);
        scores[i][2 * half] = first * of_rows.y;
        scores[i][2 * half + 1] = second * of_rows.w;
      }
    }
    // Keys with all of a row's probability: the gradient of its score is that of lse.
    const bool any_whole = __any_sync(0xffffffffu, (bits & kFromTwoOn) != 0);
    uint32_t whole[kMasks] = {};
    if (any_whole) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = 8 * i + 2 * (lane % 4) + j % 2;
          if (fabsf(scores[i][j]) > 2.f * fabsf(numbers.weights[row].y)) {
            whole[i / 8] |= 1u << (4 * (i % 8) + j);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      as_left<Element>(weights[i], scores, i);
    }
    const uint64_t grad_out = advance(grad_out_at, stage * GradOutTile::kSize * 2);
    fence_products();
    start_scores<typename Shape::VTile, GradOutTile>(scores, v_at, grad_out);
    start_sums<Element>(sums.v, weights, grad_out);

    wait_products<1>();
    hold(scores);
    hold(sums.k);
    if (last_stage >= 0) {
      arrive(&ring.empty[last_stage]);
    }
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float2 delta = reinterpret_cast<const float2*>(numbers.delta)[4 * i + lane % 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = fmaf(scores[i][j], 1.f / kWeightScale<Element>, j % 2 == 0 ? -delta.x : -delta.y);
      }
    }
    if (any_whole) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = 8 * i + 2 * (lane % 4) + j % 2;
          if ((whole[i / 8] >> (4 * (i % 8) + j) & 1) != 0) {
            scores[i][j] = 0.f;
            if (range.grad_lse.data != nullptr) {
              // To be multiplied by the weight, which is the gate.
              const float gradient =
                  range.grad_lse.at(place.batch, place.first_head + row_at(range.sequences, 0, row).head,
                                    numbers.position[row] + place.to_token);
              scores[i][j] = __fdividef(gradient, numbers.weights[row].y * kWholeFactor<Element>);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const from = &scores[2 * i + j / 2][j % 2 * 2];
        score_grads[i][j] = score_gradients<Element>(weights[i][j], from[0], from[1]);
      }
    }
    wait_products<0>();
    hold(sums.v);
    ring_place.advance();
    const bool more = position < end_position;
    if (more) {
      wait(&ring.full[ring_place.stage], ring_place.parity);
    }
    // After the last step, some scores that nobody reads.
    const int next_stage = more ? ring_place.stage : stage;
    fence_products();
    start_scores<typename Shape::KTile, QTile>(scores, k_at, advance(q_at, next_stage * QTile::kSize * 2));
    start_sums<Element>(sums.k, score_grads, advance(q_at, stage * QTile::kSize * 2));
    last_stage = stage;
    wait_products<1>();
    hold(scores);
  }
  wait_products<0>();
  hold(sums.k);
  arrive(&ring.empty[last_stage]);
}

}  // namespace nsa
