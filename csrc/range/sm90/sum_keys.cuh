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

// A warpgroup's sums over the steps of a ring, each of `step_queries` queries. K and V are whole in shared memory. Each
// thread releases what it has read. The sums of dV come out times kWeightScale.
template <typename Shape>
struct RangeKeySums {
  using Element = typename Shape::Element;
  using Numbers = RowNumbers<Shape::kRows>;
  static constexpr int kTiles = Shape::kRows / 8;
  static constexpr int kMasks = (Shape::kRows + 63) / 64;

  KeyGradientSums<Shape>& sums;
  RowRing<Shape>& ring;
  RingPlace<Shape::kStages>& ring_place;
  const KeyGradientsPlace& place;
  const RangeBackwardParams& range;
  const RowView grad_lse;
  const KeyGradientOperands<Shape> operands;
  const int lane;
  const float scale_log2;
  // Positions that see all keys.
  const int32_t all_first;
  const int32_t all_last;
  float scores[kTiles][4];  // S^T, P^T, V dO^T, V dO^T - delta
  uint32_t weights[Shape::kRows / 16][4];
  uint32_t score_grads[Shape::kRows / 16][4];
  // A bit for each of the lane's keys that has all of a row's probability, and whether any of the warp's has.
  uint32_t whole[kMasks];
  bool any_whole;

  __device__ RangeKeySums(KeyGradientSums<Shape>& sums_, RowRing<Shape>& ring_, RingPlace<Shape::kStages>& ring_place_,
                          const Element* k_data, const Element* v_data, const KeyGradientsPlace& place_,
                          const RangeBackwardParams& range_)
      : sums(sums_),
        ring(ring_),
        ring_place(ring_place_),
        place(place_),
        range(range_),
        grad_lse(range_.grad_lse),
        operands(k_data, v_data, ring_),
        lane(static_cast<int>(threadIdx.x) % 32),
        scale_log2(range_.scale * kLog2E),
        all_first(range_.visibility.first_position(place_.first_key + place_.count - 1)),
        all_last(range_.visibility.last_position(place_.first_key)) {}

  // The first of the steps begins at `position`.
  __device__ void walk(int32_t position, int32_t step_queries, int32_t steps) {
    clear(sums.k);
    clear(sums.v);
    if (steps <= 0) {
      return;
    }
    // Zeros that were written after a product has begun would be taken for a conflict with it.
    hold(sums.k);
    hold(sums.v);
    wait(&ring.full[ring_place.stage], ring_place.parity);
    fence_products();
    start_own_scores(ring_place.stage);
    wait_products<0>();
    hold(scores);
    int last_stage = -1;  // whose Q is still read
    const int32_t end_position = position + steps * step_queries;
#pragma unroll 1
    while (position < end_position) {
      const int stage = ring_place.stage;
      const Numbers& numbers = ring.numbers[stage];
      if (position < all_first || position + step_queries - 1 > all_last) {
        hide_unseen(scores, numbers, place, range.visibility, range.scale, lane);
      }
      position += step_queries;
      take_weights(numbers);
      fence_products();
      start_scores<typename Shape::VTile, typename Shape::GradOutTile>(scores, operands.v, operands.grad_out(stage));
      start_sums<Element>(sums.v, weights, operands.grad_out(stage));
      wait_products<1>();
      hold(scores);
      hold(sums.k);
      if (last_stage >= 0) {
        arrive(&ring.empty[last_stage]);
      }
      take_score_gradients(numbers);
      wait_products<0>();
      hold(sums.v);
      ring_place.advance();
      const bool more = position < end_position;
      if (more) {
        wait(&ring.full[ring_place.stage], ring_place.parity);
      }
      fence_products();
      start_own_scores(more ? ring_place.stage : stage);  // after the last step, some that nobody reads
      start_sums<Element>(sums.k, score_grads, operands.q(stage));
      last_stage = stage;
      wait_products<1>();
      hold(scores);
    }
    wait_products<0>();
    hold(sums.k);
    arrive(&ring.empty[last_stage]);
  }

  __device__ void start_own_scores(int stage) {
    start_scores<typename Shape::KTile, typename Shape::QTile>(scores, operands.k, operands.q(stage));
  }

  // From S^T to P^T, rounded.
  __device__ void take_weights(const Numbers& numbers) {
    uint32_t bits = 0;
    take_gated_probabilities(scores, numbers, scale_log2, lane, [&](float first, float second) {
      bits |= __float_as_uint(first) | __float_as_uint(second);
    });
    // Keys with all of a row's probability: the gradient of its score is that of lse.
    any_whole = __any_sync(0xffffffffu, (bits & kFromTwoOn) != 0);
#pragma unroll
    for (int i = 0; i < kMasks; ++i) {
      whole[i] = 0;
    }
    if (any_whole) {
      for_each_score<kTiles>(lane, [&](int i, int j, int row) {
        if (fabsf(scores[i][j]) > 2.f * fabsf(numbers.weights[row].y)) {
          whole[i / 8] |= 1u << (4 * (i % 8) + j);
        }
      });
    }
    round_to_left<Element>(weights, scores);
  }

  // From V dO^T to dS^T, rounded.
  __device__ void take_score_gradients(const Numbers& numbers) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 delta = reinterpret_cast<const float2*>(numbers.delta)[4 * i + lane % 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = fmaf(scores[i][j], 1.f / kWeightScale<Element>, j % 2 == 0 ? -delta.x : -delta.y);
      }
    }
    if (any_whole) {
      for_each_score<kTiles>(lane, [&](int i, int j, int row) {
        if ((whole[i / 8] >> (4 * (i % 8) + j) & 1) != 0) {
          scores[i][j] = 0.f;
          if (grad_lse.data != nullptr) {
            // To be multiplied by the weight, which is the gate.
            const float gradient = grad_lse_of_row(grad_lse, range.sequences, place, numbers, row);
            scores[i][j] = __fdividef(gradient, numbers.weights[row].y * kWholeFactor<Element>);
          }
        }
      });
    }
#pragma unroll
    for (int i = 0; i < Shape::kRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const from = &scores[2 * i + j / 2][j % 2 * 2];
        score_grads[i][j] = score_gradients<Element>(weights[i][j], from[0], from[1]);
      }
    }
  }
};

}  // namespace nsa
