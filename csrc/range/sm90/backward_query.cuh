// Attention over a range of keys, backward, for Hopper: the gradient of q. As range/sm80/backward_query.cuh:
//   P = exp(scale Q K^T - lse),   dS = P (dO V^T - delta),   dQ = scale gate dS K
// Two producer warps feed rows, and K and V, to warpgroups of 64 rows each, which share K and V; one block of threads
// stays on each multiprocessor and walks tiles of rows, the longest first (range/sm90/query_tiles.cuh).
//
// A warpgroup's step j starts dQ += dS_{j-1} K_{j-1}, S_j = Q K_j^T and dO V_j^T, one after the other, and turns S_j
// into P while the last one runs. dS stays in registers, as the left operand; K is the right operand of two products,
// once by rows and once by columns. Warpgroups take turns at starting products.
#pragma once

#include "common/sm80/tile.cuh"
#include "range/sm90/query_tiles.cuh"

namespace nsa {
namespace grad_q {

// Sets columns outside [low, high) of one of the lane's two rows to 0.
template <int kTiles>
__device__ inline void clear_outside(float (&c)[kTiles][4], int half, int32_t low, int32_t high, int lane) {
  low -= 2 * (lane % 4);
  high -= 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (8 * i + j < low || 8 * i + j >= high) {
        c[i][2 * half + j] = 0.f;
      }
    }
  }
}

// c = a b, or c += a b, for as many columns as c has: a product takes 128 of them, or 64.
template <typename Element, int kPanelBytes, int kTiles>
__device__ inline void multiply_columns(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  constexpr int kWide = kTiles / 16;
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    multiply_async<Element>(reinterpret_cast<float (&)[16][4]>(c[16 * i]), a, advance(b, 2 * kPanelBytes * i), add);
  }
  if constexpr (kTiles % 16 != 0) {
    multiply_async<Element>(reinterpret_cast<float (&)[8][4]>(c[16 * kWide]), a, advance(b, 2 * kPanelBytes * kWide),
                            add);
  }
}

// A warpgroup that consumes: 64 rows of each tile.
template <typename Shape>
struct Consumer {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  using KPlace = RingPlace<Shape::kKStages>;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kBytes = sizeof(Element);
  static constexpr int kPanelBytes = KTile::kPanelSize * kBytes;
  // Stands for a probability of 1, whose score has no gradient but that of lse.
  static constexpr float kWhole = -1.f;

  const RangeBackwardQuerySm90Params& params;
  const RangeBackwardParams& range;
  typename Shape::Shared& shared;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float scale_log2;
  const uint64_t q_at;
  const uint64_t grad_out_at;
  const uint64_t k_at;
  const uint64_t v_at;
  KPlace k_place;  // of the sums' K; that of the scores is one further
  RingPlace<Shape::kVStages> v_place;
  RingPlace<Shape::kRowSlots> slot;

  TileWalk tiles;
  RowTile tile{};
  int32_t all_begin;  // keys in [all_begin, all_end) are seen by every row
  int32_t all_end;
  // Of the lane's rows.
  float lse[2];
  float delta[2];
  const float whole;
  float grad_q[Shape::kDimK / 8][4];
  float scores[kKeys / 8][4];
  float grads[kKeys / 8][4];
  uint32_t weights[kKeys / 16][4];
  // Where the rows of the tile before go.
  Element* to[2];
  float gates[2];

  __device__ Consumer(const RangeBackwardQuerySm90Params& params_, typename Shape::Shared& shared_)
      : params(params_),
        range(params_.range),
        shared(shared_),
        scale_log2(params_.range.scale * kLog2E),
        q_at(tile_descriptor(shared_address(shared_.q), 0)),
        grad_out_at(tile_descriptor(shared_address(shared_.grad_out), 0)),
        k_at(tile_descriptor(shared_address(shared_.k), kPanelBytes)),
        v_at(tile_descriptor(shared_address(shared_.v), 0)),
        whole(params_.range.grad_lse.data == nullptr ? 0.f : kWhole) {}

  __device__ void walk(int number) {
    if (number == Shape::kConsumers - 1) {
      pass_turn();
    }
    for (int i = 0; i < number; ++i) {
      slot.advance();
    }
    if (!find_tile_with_keys()) {
      return;
    }
    take_first_step();
    bool add = false;  // to this tile's sums
#pragma unroll 1
    for (int32_t key = tile.begin + kKeys;; key += kKeys) {
      KPlace next = k_place;
      next.advance();
      const bool ends_tile = key >= tile.end;
      if (ends_tile) {
        if (!change_tile(key - kKeys)) {
          break;
        }
        key = tile.begin;
        wait(&shared.rows_full[slot.stage], slot.parity);
      }
      wait(&shared.k_full[next.stage], next.parity);
      await_turn();
      start_sums(add);
      start_scores(next);
      wait_products<1>();
      hold(grad_q);
      release(&shared.k_empty[k_place.stage]);
      k_place = next;
      start_grads();
      pass_turn();
      if (ends_tile) {
        open_tile();
        write();
        scale_lse();
      }
      add = !ends_tile;
      finish_step(key);
    }
    await_turn();
    start_sums(add);
    wait_products<0>();
    hold(grad_q);
    pass_turn();
    write();
  }

  // Steps.

  __device__ void take_first_step() {
    open_tile();
    scale_lse();
    wait(&shared.rows_full[slot.stage], slot.parity);
    wait(&shared.k_full[k_place.stage], k_place.parity);
    start_scores(k_place);
    start_grads();
    finish_step(tile.begin);
  }
  __device__ void finish_step(int32_t key) {
    wait_products<1>();
    hold(scores);
    take_probabilities();
    wait_products<0>();
    hold(grads);
    release(&shared.v_empty[v_place.stage]);
    v_place.advance();
    if (key + kKeys >= tile.end) {
      release(&shared.rows_empty[slot.stage]);
    }
    differentiate();
    mask(key);
    take_weights();
  }

  // Barriers. Warpgroup 0 produces. Named barrier i is the turn of warpgroup i; the next ones are for a consumer's own
  // threads.

  __device__ static void await_turn() { sync_threads(fresh_thread() / kWarpgroup, 2 * kWarpgroup); }
  __device__ static void pass_turn() {
    arrive_threads(fresh_thread() / kWarpgroup % Shape::kConsumers + 1, 2 * kWarpgroup);
  }
  __device__ void release(Barrier* barrier) const {
    if (lane == 0) {
      arrive(barrier);
    }
  }

  // Rows and tiles.

  // The lane's first row of the consumer's 64; its second is the eighth after it.
  __device__ static int own_row() { return fresh_thread() % kWarpgroup / 32 * 16 + fresh_thread() % 32 / 4; }
  __device__ int row_in_tile() const { return (fresh_thread() / kWarpgroup - 1) * params.consumer_rows + own_row(); }
  __device__ float number_of_row(const RowView& numbers, int half) const {
    const Row at = row_at(range.sequences, tile.head_kv, min(tile.first_row + row_in_tile() + 8 * half, tile.last_row));
    return numbers.at(tile.batch, at.head, int64_t{tile.first_token} + at.query);
  }
  // Where the gradient of one of the lane's rows begins; null where the tile lacks the row.
  __device__ Element* gradient_of_row(int half) const {
    const int32_t at_row = tile.first_row + row_in_tile() + 8 * half;
    if (own_row() + 8 * half >= params.consumer_rows || at_row > tile.last_row) {
      return nullptr;
    }
    const Row at = row_at(range.sequences, tile.head_kv, at_row);
    return range.grad_q.template row<Element>(tile.batch, int64_t{tile.first_token} + at.query, at.head);
  }
  // The next tile whose rows see keys; the gradients of those between are 0.
  __device__ bool find_tile_with_keys() {
    while (tiles.next(tile, params)) {
      if (tile.begin < tile.end) {
        return true;
      }
#pragma unroll 1
      for (int half = 0; half < 2 && !range.add_to_grad_q; ++half) {
        Element* const row = gradient_of_row(half);
        for (int column = 8 * (fresh_thread() % 4); row != nullptr && column < range.grad_q.width; column += 32) {
          *reinterpret_cast<uint4*>(row + column) = uint4{};
        }
      }
    }
    return false;
  }
  // From a tile whose last step begins at `key` to the next one, if there is one.
  __device__ bool change_tile(int32_t key) {
    clear_unused_keys(key);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to[half] = gradient_of_row(half);
      gates[half] = range.gate.data == nullptr ? 1.f : number_of_row(range.gate, half);
    }
#pragma unroll
    for (int i = 0; i < Shape::kConsumers; ++i) {
      slot.advance();
    }
    return find_tile_with_keys();
  }
  __device__ void open_tile() {
    const SequenceLayout& s = range.sequences;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      lse[half] = number_of_row(range.lse, half);
      delta[half] = number_of_row(range.delta, half);
    }
    const int32_t offset = tile.offset;
    all_begin = range.visibility.begin(offset + row_at(s, 0, tile.last_row).query);
    all_end = min(range.visibility.end(offset + row_at(s, 0, tile.first_row).query), tile.num_keys);
  }
  // Apart from open_tile, so that it doesn't wait for what is loaded there.
  __device__ void scale_lse() {
    lse[0] *= kLog2E;
    lse[1] *= kLog2E;
  }

  // Scores, and what becomes of them: probabilities, their gradients, weights of keys.

  __device__ void start_scores(const KPlace& place) {
    start_product<QTile, KTile>(scores, advance(q_at, slot.stage * QTile::kSize * kBytes),
                                advance(k_at, place.stage * KTile::kSize * kBytes));
  }
  __device__ void start_grads() {
    wait(&shared.v_full[v_place.stage], v_place.parity);
    start_product<GradOutTile, VTile>(grads, advance(grad_out_at, slot.stage * GradOutTile::kSize * kBytes),
                                      advance(v_at, v_place.stage * VTile::kSize * kBytes));
  }
  __device__ void take_probabilities() {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float probability = exp2_approx(fmaf(scores[i][j], scale_log2, -lse[j / 2]));
        scores[i][j] = probability > kWholeProbability<Element> ? whole : probability;
      }
    }
  }
  __device__ void differentiate() {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        grads[i][j] = scores[i][j] * (grads[i][j] - delta[j / 2]);
      }
    }
    if (range.grad_lse.data != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float grad_lse = number_of_row(range.grad_lse, half);
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            grads[i][j] = scores[i][j] == kWhole ? grad_lse : grads[i][j];
          }
        }
      }
    }
  }
  __device__ void mask(int32_t key) {
    if (key < all_begin || key + kKeys > all_end) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = tile.first_row + row_in_tile() + 8 * half;
        const int32_t position = tile.offset + row_at(range.sequences, 0, row).query;
        const int32_t low = range.visibility.begin(position) - key;
        const int32_t high = min(range.visibility.end(position), tile.num_keys) - key;
        clear_outside(grads, half, low, high, fresh_thread() % 32);
      }
    }
  }
  __device__ void take_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      as_left<Element>(weights[i], grads, i);
    }
  }

  // Sums, and their store.

  __device__ void start_sums(bool add) {
    const uint64_t k = advance(k_at, k_place.stage * KTile::kSize * kBytes);
    hold(grad_q);
    fence_products();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      multiply_columns<Element, kPanelBytes>(grad_q, weights[i], advance(k, 2 * 64 * 16 * i), add || i > 0);
    }
    commit_products();
  }
  // Nobody's weight of a row past the end of the sequence is other than 0, but 0 times what lies there may be NaN.
  // `key` is the first of the step.
  __device__ void clear_unused_keys(int32_t key) const {
    const int32_t used = tile.num_keys - key;
    if (used < kKeys) {
      clear_rows_from<KTile>(shared.k[k_place.stage], used, Shape::kConsumers + fresh_thread() / kWarpgroup);
    }
  }
  __device__ void write() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      write_row(to[half], range.grad_q.width, grad_q, half, range.scale * gates[half], range.add_to_grad_q,
                fresh_thread() % 32);
    }
  }
};

}  // namespace grad_q

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    range_backward_query_sm90(const __grid_constant__ RangeBackwardQuerySm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = shared_memory<typename Shape::Shared>();
  if (threadIdx.x == 0) {
    init_ring(shared.rows_full, shared.rows_empty, 1, kWarpgroup / 32);
    init_ring(shared.k_full, shared.k_empty, 1, Shape::kConsumers * kWarpgroup / 32);
    init_ring(shared.v_full, shared.v_empty, 1, Shape::kConsumers * kWarpgroup / 32);
    fence_barrier_init();
  }
  __syncthreads();
  const auto feed = [&] {
    if (threadIdx.x == 0) {
      grad_q::produce_keys<Shape>(params, shared);
    } else if (threadIdx.x / 32 == 1) {
      grad_q::produce_rows<Shape>(params, shared);
    }
  };
  split_warpgroups<Shape>(feed, [&](int consumer) { grad_q::Consumer<Shape>(params, shared).walk(consumer); });
#endif
}

}  // namespace nsa
