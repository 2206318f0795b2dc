// Attention over a range of keys, forward, for Hopper: O = softmax(scale Q K^T) V over the keys that each row sees.
//
// A block of threads walks many tiles of rows, the longest first. Its shared memory holds Q of one or two tiles, two
// stages of K and of V, the output of the last tile, and what tiles are (forward_tiles.cuh). A warpgroup of helpers lists
// tiles, copies in (feed.cuh) and out (write.cuh) for warpgroups of 64 rows each, which share K and V.
//
// A warpgroup's step j starts S_j = Q K_j^T and O += P_{j-1} V_{j-1}, and takes the softmax of S_j while the second
// product runs. Warpgroups take turns at starting products: the softmax of one runs under the products of the others.
// A tile's last product runs beside the first one of the next tile, so that tiles follow each other as steps do.
#pragma once

#include "range/sm90/feed.cuh"
#include "range/sm90/softmax.cuh"
#include "range/sm90/write.cuh"

namespace nsa {

template <typename Shape>
__device__ inline void consume_range(const RangeForwardSm90Params& params, typename Shape::Shared& shared, int number) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  using OutTile = typename Shape::OutTile;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kNext = Shape::kConsumers;
  constexpr int kStages = Shape::kStages;
  constexpr int kQStages = Shape::kQStages;
  constexpr int kTiles = Shape::kTiles;
  constexpr int kBytes = sizeof(Element);
  const RangeForwardParams& range = params.range;
  const SequenceLayout& s = range.sequences;
  // Which consumer this is. What follows from it is computed anew each time, as registers lack to keep it.
  const auto consumer = [&] {
    int copy = number;
    asm volatile("" : "+r"(copy));
    return copy;
  };
  uint32_t tiles = 0;  // taken
  uint32_t seen = 0;   // of these, with keys
  uint32_t steps = 0;  // whose scores are taken; sums lag behind by one
  float out[Shape::kDimV / 8][4];
  float scores[kKeys / 8][4];
  uint32_t weights[kKeys / 16][4] = {};
  float factors[2];
  RunningSoftmax<1> softmax;

  const auto release = [&](Barrier* barrier) {
    if (fresh_thread() % 32 == 0) {
      arrive(barrier);
    }
  };
  const auto await_turn = [&] { sync_threads(kTurnBarrier + consumer(), 2 * kWarpgroup); };
  const auto pass_turn = [&] { arrive_threads(kTurnBarrier + (consumer() + 1) % kNext, 2 * kWarpgroup); };
  const auto await_k = [&] {
    wait(&shared.k_full[RingPlace<kStages>::of(steps).stage], RingPlace<kStages>::of(steps).parity);
  };
  const auto await_v = [&] {
    wait(&shared.v_full[RingPlace<kStages>::of(steps - 1).stage], RingPlace<kStages>::of(steps - 1).parity);
  };
  const auto start_scores = [&] {
    const uint64_t q = tile_descriptor(shared_address(shared.q[RingPlace<kQStages>::of(seen).stage][consumer()]), 0);
    const uint64_t k = tile_descriptor(shared_address(shared.k[RingPlace<kStages>::of(steps).stage]), 0);
    hold(scores);
    fence_products();
#pragma unroll
    for (int column = 0; column < Shape::kDimK; column += 16) {
      const int panel = column / 64;
      const int inside = column % 64;
      multiply_async<Element>(scores, advance(q, 2 * (panel * QTile::kPanelSize + inside)),
                              advance(k, 2 * (panel * KTile::kPanelSize + inside)), column != 0);
    }
    commit_products();
  };
  // `add` false: these are a tile's first, and what was in `out` before is lost.
  const auto start_sums = [&](bool add) {
    const uint64_t v =
        tile_descriptor(shared_address(shared.v[RingPlace<kStages>::of(steps - 1).stage]), VTile::kPanelSize * kBytes);
    hold(out);
    fence_products();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      multiply_async<Element>(out, weights[i], advance(v, 2 * 64 * 16 * i), add || i != 0);
    }
    commit_products();
  };
  const auto take_weights = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      as_left<Element>(weights[i], scores, i);
    }
  };
  const auto mask = [&](const RangeTile& tile, int32_t key) {
    if (key >= tile.all_begin && key + kKeys <= tile.all_end) {
      return;
    }
    const int thread = fresh_thread() % kWarpgroup;
    const int32_t row = tile.first_row + consumer() * params.consumer_rows + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t position = tile.offset + row_at(s, 0, row + 8 * half).query;
      if (key < tile.all_begin) {
        drop_before(scores, half, range.visibility.begin(position) - key, thread % 32);
      }
      if (key + kKeys > tile.all_end) {
        drop_from(scores, half, min(range.visibility.end(position), tile.length) - key, thread % 32);
      }
    }
  };
  const auto release_k = [&](bool last) {
    release(&shared.k_empty[RingPlace<kStages>::of(steps).stage]);
    if (last) {
      release(&shared.q_empty[RingPlace<kQStages>::of(seen).stage]);
    }
  };
  const auto release_v = [&] { release(&shared.v_empty[RingPlace<kStages>::of(steps - 1).stage]); };
  // Nobody's weight of a row past the end is other than 0, but 0 times what lies there may be NaN.
  const auto clear_values_beyond = [&](int32_t rows) {
    if (rows >= kKeys) {
      return;
    }
#pragma unroll 1
    for (int i = 8 * rows + fresh_thread() % kWarpgroup; i < 8 * kKeys; i += kWarpgroup) {
#pragma unroll
      for (int panel = 0; panel < VTile::kPanels; ++panel) {
        Element* chunk = shared.v[RingPlace<kStages>::of(steps - 1).stage] + panel * VTile::kPanelSize + 8 * i;
        *reinterpret_cast<uint4*>(chunk) = uint4{};
      }
    }
    fence_shared_writes();
    sync_threads(kConsumerBarrier + consumer(), kWarpgroup);
  };
  // The factors that end the sums of a tile; lse leaves.
  const auto finish = [&](const RangeTile& tile) {
    const int thread = fresh_thread() % kWarpgroup;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SoftmaxResult result = softmax.finish(0, half, params.scale_log2);
      factors[half] = result.factor;
      const int own_row = thread / 32 * 16 + thread % 32 / 4 + 8 * half;
      const int32_t at_row = tile.first_row + consumer() * params.consumer_rows + own_row;
      if (thread % 4 == 0 && own_row < params.consumer_rows && at_row <= tile.last_row) {
        const Row at = row_at(s, tile.head_kv, at_row);
        range.lse.at(tile.batch, at.head, int64_t{tile.first_token} + at.query) = result.lse;
      }
    }
  };

  // Rounds the output of the last tile seen into shared memory.
  const auto stage = [&] {
    const int thread = fresh_thread() % kWarpgroup;
    const int first_row = thread / 32 * 16;
    const int lane = thread % 32;
    const OutTile to{shared_address(shared.out[consumer()])};
    bool sums = false;
    if constexpr (Shape::kSums) {
      sums = range.sum.out != nullptr;
      if (sums) {
        wait(&shared.others_full, RingPlace<1>::of(seen - 1).parity);
        float gates[2][3];
#pragma unroll
        for (int i = 0; i < 6; ++i) {
          gates[i / 3][i % 3] = shared.gates[64 * consumer() + first_row + lane / 4 + 8 * (i / 3)][i % 3];
        }
        const OutTile selected{shared_address(shared.q[RingPlace<kQStages>::of(seen - 1).stage][consumer()])};
        stage_gated_rows<Element>(to, selected, out, factors, gates, first_row, lane);
      }
    }
    if (!sums) {
      wait(&shared.out_empty, RingPlace<1>::of(seen - 1).parity ^ 1);
      stage_rows<Element>(to, out, factors, first_row, lane);
    }
    fence_shared_writes();
    arrive(&shared.out_full);
  };

  if (number == kNext - 1) {
    pass_turn();
  }
  clear(out);
  bool unfinished = false;  // the tile before lacks one product of its sums
  bool add = false;
  int32_t key = 0;
#pragma unroll 1
  while (true) {
    if (unfinished) {
      const RangeTile& before = shared.tiles[RingPlace<kTiles>::of(tiles - 1).stage];
      finish(before);
      await_v();
      clear_values_beyond(before.length - key);
    }
    wait(&shared.tile_full[RingPlace<kTiles>::of(tiles).stage], RingPlace<kTiles>::of(tiles).parity);
    const RangeTile& tile = shared.tiles[RingPlace<kTiles>::of(tiles).stage];
    key = tile.begin;
    int more = key < tile.end ? 1 : 0;
    asm volatile("" : "+r"(more));  // or both sides of the comparison are kept
    if (more != 0) {
      wait(&shared.q_full[RingPlace<kQStages>::of(seen).stage], RingPlace<kQStages>::of(seen).parity);
      await_k();
      await_turn();
    }
    // One of these products is for nothing where there is no tile before, or no key: a branch around it would make the
    // compiler wait for each.
    start_scores();
    start_sums(add);
    if (more != 0) {
      pass_turn();
    }
    wait_products<1>();
    hold(scores);
    if (more != 0) {
      release_k(key + kKeys >= tile.end);
      mask(tile, key);
      softmax = RunningSoftmax<1>();
      float none[2];
      softmax.weigh(0, scores, none, params.scale_log2);
    }
    wait_products<0>();
    hold(out);
    take_weights();
    if (unfinished) {
      release_v();
      stage();
      arrive(&shared.tile_empty[RingPlace<kTiles>::of(tiles - 1).stage]);
    }
    unfinished = more != 0;
    if (more == 0) {
      const RangeTile& unseen = shared.tiles[RingPlace<kTiles>::of(tiles).stage];
      if (unseen.first_row > unseen.last_row) {
        return;
      }
      write_unseen_rows<Element>(params, unseen, consumer());
      arrive(&shared.tile_empty[RingPlace<kTiles>::of(tiles).stage]);
      ++tiles;
      continue;
    }
    ++steps;
    add = false;
#pragma unroll 1
    while (key + kKeys < shared.tiles[RingPlace<kTiles>::of(tiles).stage].end) {
      const RangeTile& tile = shared.tiles[RingPlace<kTiles>::of(tiles).stage];
      key += kKeys;
      await_k();
      await_turn();
      start_scores();
      await_v();
      start_sums(add);
      pass_turn();
      add = true;
      wait_products<1>();
      hold(scores);
      release_k(key + kKeys >= tile.end);
      mask(tile, key);
      const bool rises = weigh_lazily(softmax, scores, factors, params.scale_log2);
      wait_products<0>();
      hold(out);
      release_v();
      if (rises) {
        softmax.rescale(out, factors);
      }
      take_weights();
      ++steps;
    }
    ++seen;
    ++tiles;
  }
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    range_forward_sm90(const __grid_constant__ RangeForwardSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    prefetch_map(&params.q);
    prefetch_map(&params.k);
    prefetch_map(&params.v);
    for (int i = 0; i < Shape::kQStages; ++i) {
      init_barrier(&shared.q_full[i], 1);
      init_barrier(&shared.q_empty[i], Shape::kConsumers * kWarpgroup / 32);
    }
    for (int i = 0; i < Shape::kStages; ++i) {
      init_barrier(&shared.k_full[i], 1);
      init_barrier(&shared.k_empty[i], Shape::kConsumers * kWarpgroup / 32);
      init_barrier(&shared.v_full[i], 1);
      init_barrier(&shared.v_empty[i], Shape::kConsumers * kWarpgroup / 32);
    }
    for (int i = 0; i < Shape::kTiles; ++i) {
      init_barrier(&shared.tile_full[i], 1);
      init_barrier(&shared.tile_empty[i], Shape::kConsumers * kWarpgroup + 1 + 32);  // and what feeds and stores
    }
    init_barrier(&shared.others_full, 1 + 32);
    init_barrier(&shared.out_full, Shape::kConsumers * kWarpgroup);
    init_barrier(&shared.out_empty, 32);
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    shrink_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce_range<Shape>(params, shared);
    } else if (threadIdx.x / 32 == 1) {
      list_range_tiles<Shape>(params, shared);
    } else if (threadIdx.x / 32 == 2) {
      store_range<Shape>(params, shared);
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    consume_range<Shape>(params, shared, warpgroup - 1);
  }
#endif
}

}  // namespace nsa
