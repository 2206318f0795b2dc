// Attention over listed blocks, backward, for Hopper: the gradients of k and v. common/sm90/key_gradients.cuh has the
// formulas.
//
// A block of threads stays on its multiprocessor. Its two warpgroups work for themselves: each takes the next piece of
// work (KeyPieces), holds the 64 keys of one block and KV head, and sums over queries that chose it. Of a third
// warpgroup, two warps feed each: one takes pieces and copies Q and dO of a step's queries, each query's G heads by a
// box of their own, the other gathers lse, gate and delta. They go on with the next piece while the last one ends.
//
// Pieces come chunk by chunk of the queries, so that all warpgroups gather from the same few thousand queries at a time
// and find them in L2. The pieces of a block are added in their order, in float32: each waits until the one before it,
// which was taken earlier, has been added.
//
// Shared memory, of each: K, V | a ring of stages, each Q, dO and numbers of a step's rows.
#pragma once

#include "selected/sm90/feed_keys.cuh"

namespace nsa {

// Hands the gradients of a step's scores over, turned round so that they are left operands of the gradient of q: while
// the last products of the step run.
template <typename Shape>
struct HandsScoresOver {
  const typename SelectedBackwardKeysShared<Shape>::Part& part;
  const SelectedBackwardParams& params;
  uint32_t kept[Shape::kRows / 16][4] = {};

  __device__ void keep(const uint32_t (&score_grads)[Shape::kRows / 16][4]) {
#pragma unroll
    for (int i = 0; i < Shape::kRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        kept[i][j] = score_grads[i][j];
      }
    }
  }
  __device__ void send(int stage) const {
    auto* const to = static_cast<uint2*>(params.handed.data);
    if (to == nullptr) {
      return;
    }
    const int lane = fresh_thread() % 32;
    const int warp = fresh_thread() % kWarpgroup / 32;
    const int key_units = HandedScores::key_units(params.sequences.group);
    // Keys after the end of a sequence may be anything.
    const int32_t keys = part.handed_keys[stage] - 16 * warp - lane / 4;
#pragma unroll
    for (int i = 0; i < Shape::kRows / 8; ++i) {
      const uint32_t first = turn_matrix(keys > 0 ? kept[i / 2][2 * (i % 2)] : 0u);
      const uint32_t second = turn_matrix(keys > 8 ? kept[i / 2][2 * (i % 2) + 1] : 0u);
      const int32_t at = part.handed_at[stage][8 * i + lane / 4];
      if (at >= 0) {
        __stcs(to + (int64_t{at} + key_units * warp) * 4 + lane % 4, make_uint2(first, second));
      }
    }
  }
};

// Adds the sums of the block's earlier pieces.
template <int kTiles>
__device__ inline void load_sums(float (&sums)[kTiles][4], const float4* from) {
  constexpr int kAtOnce = 4;
  static_assert(kTiles % kAtOnce == 0);
#pragma unroll
  for (int first = 0; first < kTiles; first += kAtOnce) {
    float4 loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      loaded[i] = __ldcg(from + (first + i) * kWarpgroup);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      sums[first + i][0] += loaded[i].x;
      sums[first + i][1] += loaded[i].y;
      sums[first + i][2] += loaded[i].z;
      sums[first + i][3] += loaded[i].w;
    }
    __syncwarp();  // no more loads at once, for registers
  }
}
template <int kTiles>
__device__ inline void store_sums(float4* to, const float (&sums)[kTiles][4], bool first) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (first) {
      __stcg(to + i * kWarpgroup, make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
    } else {
      add_floats(to + i * kWarpgroup, sums[i]);
    }
  }
}

__device__ inline int32_t* warps_done_with(const SelectedBackwardParams& selected, const SelectedKeyItem& item) {
  return selected.chosen_by.pieces.progress + item.piece.id + item.head_kv + 1;
}

// Adds the sums to those of the block's earlier pieces, in L2, or with those to the gradients. What a thread adds to
// has been stored by the same thread of another warpgroup.
template <typename Shape>
__device__ inline void finish_piece(const SelectedBackwardKeysSm90Params& params, const SelectedKeyItem& item,
                                    KeyGradientSums<Shape>& sums) {
  using Element = typename Shape::Element;
  constexpr int kTilesK = Shape::kDimK / 8;
  constexpr int kTilesV = Shape::kDimV / 8;
  const SelectedBackwardParams& selected = params.selected;
  const KeyPiece& piece = item.piece;
  if (piece.number > 0 || piece.last == 0) {
    const int thread = fresh_thread() % kWarpgroup;
    float4* const at = reinterpret_cast<float4*>(selected.partials) +
                       int64_t{piece.id - params.first_block} * ((kTilesK + kTilesV) * kWarpgroup) + thread;
    if (piece.number > 0) {
      if (thread % 32 == 0) {
        const int32_t* const warps_done = warps_done_with(selected, item);
        wait_until([&] { return observe_all(warps_done) >= kWarpgroup / 32 * piece.number; });
      }
      __syncwarp();
    }
    if (piece.last == 0) {
      store_sums(at, sums.k, piece.number == 0);
      store_sums(at + kTilesK * kWarpgroup, sums.v, piece.number == 0);
      return;
    }
    load_sums(sums.k, at);
    load_sums(sums.v, at + kTilesK * kWarpgroup);
  }
  const int64_t key = item.place.k_begin + item.first_key;
  store_gradients(selected.grad_k.row<Element>(item.place.batch, key, item.head_kv), selected.grad_k.token_stride,
                  item.count, selected.grad_k.width, sums.k, selected.scale);
  store_gradients(selected.grad_v.row<Element>(item.place.batch, key, item.head_kv), selected.grad_v.token_stride,
                  item.count, selected.grad_v.width, sums.v, 1.f);
}

// The warp's part of a piece has been added, as far as the next piece of its block must know.
template <typename Shape>
__device__ inline void release_item(const SelectedBackwardKeysSm90Params& params,
                                    typename SelectedBackwardKeysShared<Shape>::Part& part, uint32_t number) {
  __syncwarp();
  if (fresh_thread() % 32 == 0) {
    const SelectedKeyItem& item = part.items[number % 2];
    if (item.piece.last == 0) {
      add_to_all(warps_done_with(params.selected, item), 1);
    }
  }
  arrive(&part.item_empty[number % 2]);
}

template <typename Shape>
__device__ inline void sum_chosen_gradients(const SelectedBackwardKeysSm90Params& params,
                                            typename SelectedBackwardKeysShared<Shape>::Part& part) {
  const SelectedBackwardParams& selected = params.selected;
  KeyGradientSums<Shape> sums;
  RingPlace<Shape::kStages> ring_place;
  HandsScoresOver<Shape> hand_over{.part = part, .params = selected};
  // The number of the piece, kept where it takes no register in the loop over steps.
  const auto kept_number = [&] { return &part.number_of_warp[fresh_thread() % kWarpgroup / 32]; };
  const auto number = [&] { return *const_cast<volatile uint32_t*>(kept_number()); };
#pragma unroll 1
  for (;;) {
    const SelectedKeyItem& item = part.items[number() % 2];
    wait(&part.item_full[number() % 2], number() / 2 % 2);
    if (item.count > 0) {
      wait(&part.keys_full, number() % 2);
    }
    if (number() > 0) {  // not at once: what was added is on its way
      release_item<Shape>(params, part, number() - 1);
    }
    if (item.count == 0) {
      return;
    }
    sum_key_gradients(sums, part.ring, ring_place, part.k, part.v, part.places[number() % 2],
                      {.stride = 1, .first_seen = 0, .window = Visibility::kNoWindow, .by_stride = Divisor()},
                      selected.scale, selected.sequences, selected.grad_lse,
                      (item.piece.queries + params.step_queries - 1) / params.step_queries, hand_over);
    if (fresh_thread() % 32 == 0) {
      arrive(&part.keys_empty);
    }
    finish_piece<Shape>(params, part.items[number() % 2], sums);
    __syncwarp();
    if (fresh_thread() % 32 == 0) {
      *kept_number() = number() + 1;
    }
    __syncwarp();
  }
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(3 * kWarpgroup, 1)
    selected_backward_keys_sm90(const __grid_constant__ SelectedBackwardKeysSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char selected_shared_bytes[];
  auto& shared = *reinterpret_cast<SelectedBackwardKeysShared<Shape>*>(selected_shared_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  if (thread < 2) {
    shared.parts[thread].init_barriers();
    fence_barrier_init();
  }
  const int unfilled = params.step_queries * params.selected.sequences.group;
  for (int part = 0; part < 2; ++part) {
    clear_rows(shared.parts[part].ring, unfilled, thread, 3 * kWarpgroup);
  }
  fence_shared_writes();
  __syncthreads();
  if (warp < 4) {
    shrink_registers<Shape::kProducerRegisters>();
    auto& part = shared.parts[warp / 2];
    if (warp % 2 == 0) {
      copy_chosen<Shape>(params, part);
    } else {
      gather_numbers<Shape>(params, part, lane);
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    sum_chosen_gradients<Shape>(params, shared.parts[warp / 4 - 1]);
  }
#endif
}

}  // namespace nsa
