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

// c = a b, of two tiles' rows.
template <typename Left, typename Right, int kTiles>
__device__ inline void start_product(float (&c)[kTiles][4], uint64_t a, uint64_t b) {
  hold(c);
  fence_products();
#pragma unroll
  for (int column = 0; column < Left::kColumns; column += 16) {
    const int panel = column / 64;
    const int inside = column % 64;
    multiply_async<typename Left::Element>(c, advance(a, 2 * (panel * Left::kPanelSize + inside)),
                                           advance(b, 2 * (panel * Right::kPanelSize + inside)), column != 0);
  }
  commit_products();
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

template <typename Shape>
__device__ inline void consume(const RangeBackwardQuerySm90Params& params, typename Shape::Shared& shared,
                               int consumer) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kBytes = sizeof(Element);
  constexpr int kPanelBytes = KTile::kPanelSize * kBytes;
  const RangeBackwardParams& range = params.range;
  const SequenceLayout& s = range.sequences;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // The lane's first row of the consumer's 64; its second is the eighth after it.
  const auto own_row = [] { return fresh_thread() % kWarpgroup / 32 * 16 + fresh_thread() % 32 / 4; };
  const auto row_in_tile = [&] { return (fresh_thread() / kWarpgroup - 1) * params.consumer_rows + own_row(); };

  const auto release = [&](Barrier* barrier) {
    if (lane == 0) {
      arrive(barrier);
    }
  };
  // Warpgroup 0 produces. Named barrier i is the turn of warpgroup i; the next ones are for a consumer's own threads.
  const auto await_turn = [&] { sync_threads(fresh_thread() / kWarpgroup, 2 * kWarpgroup); };
  const auto pass_turn = [&] { arrive_threads(fresh_thread() / kWarpgroup % Shape::kConsumers + 1, 2 * kWarpgroup); };
  if (consumer == Shape::kConsumers - 1) {
    pass_turn();
  }

  const float scale_log2 = range.scale * kLog2E;
  const uint64_t q_at = tile_descriptor(shared_address(shared.q), 0);
  const uint64_t grad_out_at = tile_descriptor(shared_address(shared.grad_out), 0);
  const uint64_t k_at = tile_descriptor(shared_address(shared.k), kPanelBytes);
  const uint64_t v_at = tile_descriptor(shared_address(shared.v), 0);
  RingPlace<Shape::kKStages> k_place;  // of the sums' K; that of the scores is one further
  RingPlace<Shape::kVStages> v_place;
  RingPlace<Shape::kRowSlots> slot;
  for (int i = 0; i < consumer; ++i) {
    slot.advance();
  }

  TileWalk walk;
  RowTile tile{};
  const auto number_of_row = [&](const RowView& numbers, int half) {
    const Row at = row_at(s, tile.head_kv, min(tile.first_row + row_in_tile() + 8 * half, tile.last_row));
    return numbers.at(tile.batch, at.head, int64_t{tile.first_token} + at.query);
  };
  // Where the gradient of one of the lane's rows begins; null where the tile lacks the row.
  const auto gradient_of_row = [&](int half) -> Element* {
    const int32_t at_row = tile.first_row + row_in_tile() + 8 * half;
    if (own_row() + 8 * half >= params.consumer_rows || at_row > tile.last_row) {
      return nullptr;
    }
    const Row at = row_at(s, tile.head_kv, at_row);
    return range.grad_q.row<Element>(tile.batch, int64_t{tile.first_token} + at.query, at.head);
  };
  // The next tile whose rows see keys; the gradients of those between are 0.
  const auto find_tile_with_keys = [&] {
    while (walk.next(tile, params)) {
      if (tile.begin < tile.end) {
        return true;
      }
      for (int half = 0; half < 2 && !range.add_to_grad_q; ++half) {
        Element* const to = gradient_of_row(half);
        for (int column = 8 * (fresh_thread() % 4); to != nullptr && column < range.grad_q.width; column += 32) {
          *reinterpret_cast<uint4*>(to + column) = uint4{};
        }
      }
    }
    return false;
  };

  float lse[2];
  float delta[2];
  int32_t all_begin;  // keys in [all_begin, all_end) are seen by every row
  int32_t all_end;
  const auto open_tile = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      lse[half] = number_of_row(range.lse, half);
      delta[half] = number_of_row(range.delta, half);
    }
    const int32_t offset = tile.offset;
    all_begin = range.visibility.begin(offset + row_at(s, 0, tile.last_row).query);
    all_end = min(range.visibility.end(offset + row_at(s, 0, tile.first_row).query), tile.num_keys);
  };

  // Apart from open_tile, so that it doesn't wait for what is loaded there.
  const auto scale_lse = [&] {
    lse[0] *= kLog2E;
    lse[1] *= kLog2E;
  };

  // Stands for a probability of 1, whose score has no gradient but that of lse.
  constexpr float kWhole = -1.f;
  const float whole = range.grad_lse.data == nullptr ? 0.f : kWhole;
  float grad_q[Shape::kDimK / 8][4];
  float scores[kKeys / 8][4];
  float grads[kKeys / 8][4];
  uint32_t weights[kKeys / 16][4];

  const auto start_scores = [&](const RingPlace<Shape::kKStages>& place) {
    start_product<QTile, KTile>(scores, advance(q_at, slot.stage * QTile::kSize * kBytes),
                                advance(k_at, place.stage * KTile::kSize * kBytes));
  };
  const auto start_grads = [&] {
    wait(&shared.v_full[v_place.stage], v_place.parity);
    start_product<GradOutTile, VTile>(grads, advance(grad_out_at, slot.stage * GradOutTile::kSize * kBytes),
                                      advance(v_at, v_place.stage * VTile::kSize * kBytes));
  };
  const auto start_sums = [&](bool add) {
    const uint64_t k = advance(k_at, k_place.stage * KTile::kSize * kBytes);
    hold(grad_q);
    fence_products();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      multiply_columns<Element, kPanelBytes>(grad_q, weights[i], advance(k, 2 * 64 * 16 * i), add || i > 0);
    }
    commit_products();
  };
  const auto take_probabilities = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float probability = exp2_approx(fmaf(scores[i][j], scale_log2, -lse[j / 2]));
        scores[i][j] = probability > kWholeProbability<Element> ? whole : probability;
      }
    }
  };
  const auto take_weights = [&](int32_t key) {
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
    if (key < all_begin || key + kKeys > all_end) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t position = tile.offset + row_at(s, 0, tile.first_row + row_in_tile() + 8 * half).query;
        const int32_t low = range.visibility.begin(position) - key;
        const int32_t high = min(range.visibility.end(position), tile.num_keys) - key;
        clear_outside(grads, half, low, high, fresh_thread() % 32);
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      as_left<Element>(weights[i], grads, i);
    }
  };
  const auto finish_step = [&](int32_t key) {
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
    take_weights(key);
  };
  // Nobody's weight of a row past the end of the sequence is other than 0, but 0 times what lies there may be NaN.
  // `key` is the first of the step.
  const auto clear_unused_keys = [&](int32_t key) {
    const int32_t used = tile.num_keys - key;
    if (used < kKeys) {
#pragma unroll 1
      for (int i = 8 * used + fresh_thread() % kWarpgroup; i < 8 * kKeys; i += kWarpgroup) {
#pragma unroll
        for (int panel = 0; panel < KTile::kPanels; ++panel) {
          Element* chunk = shared.k[k_place.stage] + panel * KTile::kPanelSize + 8 * i;
          *reinterpret_cast<uint4*>(chunk) = uint4{};
        }
      }
      fence_shared_writes();
      sync_threads(Shape::kConsumers + fresh_thread() / kWarpgroup, kWarpgroup);
    }
  };

  if (!find_tile_with_keys()) {
    return;
  }
  open_tile();
  scale_lse();
  wait(&shared.rows_full[slot.stage], slot.parity);
  wait(&shared.k_full[k_place.stage], k_place.parity);
  start_scores(k_place);
  start_grads();
  finish_step(tile.begin);
  bool add = false;  // to this tile's sums
  Element* to[2];
  float gates[2];
  const auto write = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      write_row(to[half], range.grad_q.width, grad_q, half, range.scale * gates[half], range.add_to_grad_q,
                fresh_thread() % 32);
    }
  };
#pragma unroll 1
  for (int32_t key = tile.begin + kKeys;; key += kKeys) {
    RingPlace<Shape::kKStages> next = k_place;
    next.advance();
    const bool ends_tile = key >= tile.end;
    if (ends_tile) {
      clear_unused_keys(key - kKeys);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        to[half] = gradient_of_row(half);
        gates[half] = range.gate.data == nullptr ? 1.f : number_of_row(range.gate, half);
      }
#pragma unroll
      for (int i = 0; i < Shape::kConsumers; ++i) {
        slot.advance();
      }
      if (!find_tile_with_keys()) {
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

}  // namespace grad_q

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    range_backward_query_sm90(const __grid_constant__ RangeBackwardQuerySm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kRowSlots; ++i) {
      init_barrier(&shared.rows_full[i], 1);
      init_barrier(&shared.rows_empty[i], kWarpgroup / 32);
    }
    for (int i = 0; i < Shape::kKStages; ++i) {
      init_barrier(&shared.k_full[i], 1);
      init_barrier(&shared.k_empty[i], Shape::kConsumers * kWarpgroup / 32);
    }
    for (int i = 0; i < Shape::kVStages; ++i) {
      init_barrier(&shared.v_full[i], 1);
      init_barrier(&shared.v_empty[i], Shape::kConsumers * kWarpgroup / 32);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    shrink_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) {
      grad_q::produce_keys<Shape>(params, shared);
    } else if (threadIdx.x / 32 == 1) {
      grad_q::produce_rows<Shape>(params, shared);
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    grad_q::consume<Shape>(params, shared, warpgroup - 1);
  }
#endif
}

}  // namespace nsa
