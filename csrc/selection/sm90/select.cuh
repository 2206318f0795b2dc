// select_blocks for Hopper. Of each query, with the lse of compressed attention known:
//   p[m] = sum over the group's heads of exp(scale <q, k_m> - lse), for the compressed blocks m that it sees
// and from p the list of blocks (selection/sm90/ranking.cuh).
//
// The product is K Q^T: a step's 64 keys are the rows, the heads of several queries lie side by side along the columns,
// so that summing over the heads takes additions within a thread and exchanges between the four lanes of a row. One
// warp feeds tiles of keys to consumer warpgroups, which share them; each has queries of its own, whose Q, copied by
// another warp, stays in shared memory for the whole walk over the keys. Two or four more warps for each consumer rank.
// A block of threads walks many tiles of queries, the longest first. Consumers take turns at starting products, so that
// the exponentials of one run under the products of the others.
//
// A consumer's step: wait for S_j; exponentials and sums over heads; start S_{j+1}; p to the strips, for the ranking
// warp. Shared memory: shape.cuh. Figures: docs/notes/hopper_select_blocks.md.
#pragma once

#include "selection/sm90/ranking.cuh"

namespace nsa {

// By one thread.
template <typename Shape>
__device__ inline void produce_keys(const SelectSm90Params& params, typename Shape::Shared& shared) {
  using KTile = typename Shape::KTile;
  prefetch_map(&params.k);
  RingPlace<Shape::kStages> ring;
  for_each_select_tile(params, [&](const SelectSm90Tile& tile) {
    const int32_t batch = static_cast<int32_t>(tile.place.batch);
    const int32_t first_key = static_cast<int32_t>(tile.place.cmp_begin);
#pragma unroll 1
    for (int32_t step = 0; step < tile.steps; ++step) {
      Barrier* const full = &shared.k_full[ring.stage];
      wait(&shared.k_empty[ring.stage], ring.parity ^ 1);
      arrive_expecting(full, KTile::kSize * sizeof(typename Shape::Element));
#pragma unroll
      for (int panel = 0; panel < KTile::kPanels; ++panel) {
        copy_box(shared.k[ring.stage] + panel * KTile::kPanelSize, &params.k, full, 64 * panel, tile.head_kv,
                 first_key + step * params.steps.keys, batch, kEvictLast);
      }
      ring.advance();
    }
  });
}

// Q and lse. By one warp.
template <typename Shape>
__device__ inline void produce_queries(const SelectSm90Params& params, typename Shape::Shared& shared) {
  using QTile = typename Shape::QTile;
  prefetch_map(&params.q);
  const RowView& lse = params.select.lse;
  const int32_t group = params.select.sequences.group;
  const int32_t query_rows = params.parts * Shape::kSlot;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t parities = 0;  // bit i: consumer i's
  for_each_select_tile(params, [&](const SelectSm90Tile& tile) {
    const int32_t batch = static_cast<int32_t>(tile.place.batch);
    const int32_t first_head = tile.head_kv * group;
    const int32_t first_token = static_cast<int32_t>(tile.place.q_begin) + tile.first_query;
    const int32_t tokens = tile.steps > 0 ? tile.end_query - tile.first_query : 0;
#pragma unroll 1
    for (int i = 0; i * params.queries < tokens; ++i) {
      wait(&shared.q_empty[i], (parities >> i & 1) ^ 1);
      parities ^= 1u << i;
      const int32_t token = first_token + i * params.queries;
      const int32_t queries = min(tokens - i * params.queries, params.queries);
      for (int column = lane; column < Shape::kColumns; column += 32) {
        const auto query = static_cast<int32_t>(params.by_parts.divide(column / Shape::kSlot));
        const int32_t head = column - query * query_rows;
        if (query < queries && head < group) {
          copy_number(&shared.lse[i][column], &lse.at(batch, first_head + head, token + query), true);
        }
      }
      arrive_after_copies(&shared.q_full[i]);
      if (lane == 0) {
        arrive_expecting(&shared.q_full[i], params.consumer_bytes);
        const int copies = group == query_rows ? 1 : params.queries;
        for (int query = 0; query < copies; ++query) {
#pragma unroll
          for (int panel = 0; panel < QTile::kPanels; ++panel) {
            copy_box(shared.q[i] + panel * QTile::kPanelSize + 64 * query_rows * query, &params.q, &shared.q_full[i],
                     64 * panel, first_head, token + query, batch, kEvictFirst);
          }
        }
      }
    }
  });
}

// From a tile of scores to probabilities summed over the heads of each slot, shared out to the four lanes that have a
// row's columns: this lane gets those of row lane / 4 + 8 (lane % 2), of slots 2 i + lane / 2 % 2. Sums lag behind the
// exponentials by one pair of slots, so that they don't wait for them.
template <int kSlot, int kTiles>
__device__ inline void sum_probabilities(float (&sums)[kTiles * 4 / kSlot], const float (&scores)[kTiles][4],
                                         const float (&shifts)[kTiles][2], float scale_log2, int lane) {
  constexpr int kPairs = kTiles * 4 / kSlot;
  constexpr int kWide = kTiles / kPairs;  // accumulator tiles of a pair of slots
  const bool odd = lane & 1;
  const bool upper = lane & 2;
  float p[2][kWide][4];
  const auto exponentials = [&](int pair) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int from = pair * kWide + i;
        p[pair % 2][i][j] = exp2_approx(fmaf(scores[from][j], scale_log2, shifts[from][j % 2]));
      }
    }
  };
  // Of the lane's two rows, exchanged with its neighbour's.
  const auto exchange = [&](float first, float second) {
    return (odd ? second : first) + __shfl_xor_sync(kWholeWarp, odd ? first : second, 1);
  };
  exponentials(0);
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    if (pair + 1 < kPairs) {
      exponentials(pair + 1);
    }
    float halves[kWide][2];
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      halves[i][0] = p[pair % 2][i][0] + p[pair % 2][i][1];
      halves[i][1] = p[pair % 2][i][2] + p[pair % 2][i][3];
    }
    if constexpr (kSlot == 4) {
      sums[pair] = exchange(halves[0][0], halves[0][1]);
    } else {
      constexpr int kOf = kWide / 2;  // one slot's
      float rows[2];
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        float first = halves[slot * kOf][0];
        float second = halves[slot * kOf][1];
        if constexpr (kOf == 2) {
          first += halves[slot * kOf + 1][0];
          second += halves[slot * kOf + 1][1];
        }
        rows[slot] = exchange(first, second);
      }
      sums[pair] = (upper ? rows[1] : rows[0]) + __shfl_xor_sync(kWholeWarp, upper ? rows[0] : rows[1], 2);
    }
  }
}

template <typename Shape>
__device__ inline void consume_select(const SelectSm90Params& params, typename Shape::Shared& shared, int consumer) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  constexpr int kTiles = Shape::kColumns / 8;
  constexpr int kKept = Shape::kSlots / 2;
  const SelectBlocksParams& select = params.select;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto release = [&](Barrier* barrier) {
    if (lane == 0) {
      arrive(barrier);
    }
  };

  const float scale_log2 = select.scale * kLog2E;
  const uint64_t q_at = tile_descriptor(shared_address(shared.q[consumer]), 0);
  const uint64_t k_at = tile_descriptor(shared_address(shared.k), 0);
  const auto await_turn = [&] { sync_threads(kTurnBarrier + consumer, 2 * kWarpgroup); };
  const auto pass_turn = [&] { arrive_threads(kTurnBarrier + (consumer + 1) % Shape::kConsumers, 2 * kWarpgroup); };
  if (consumer == Shape::kConsumers - 1) {
    pass_turn();
  }
  RingPlace<Shape::kStages> ring;
  uint32_t q_parity = 0;
  int32_t base = 0;  // where a walk begins in the strips: after the one before, some of which may not be ranked yet
  RingPlace<Shape::kStripTiles> strips;

  for_each_select_tile(params, [&](const SelectSm90Tile& tile) {
    const int32_t first_query = tile.first_query + consumer * params.queries;
    if (first_query >= tile.end_query || tile.steps == 0) {
      for (int32_t step = 0; step < tile.steps; ++step) {
        await_turn();
        pass_turn();
        wait(&shared.k_full[ring.stage], ring.parity);
        release(&shared.k_empty[ring.stage]);
        ring.advance();
      }
      return;
    }
    const int32_t first_position = tile.place.offset + first_query;
    // Steps whose keys the first query, and so every one, sees.
    const int32_t whole_steps = params.seen.end(first_position) / params.steps.keys;

    wait(&shared.q_full[consumer], q_parity);
    q_parity ^= 1;
    sync_threads(kConsumerBarrier + consumer, kWarpgroup);
    const int thread = fresh_thread() % kWarpgroup;
    shared.shifts[consumer][thread] = -kLog2E * shared.lse[consumer][thread];
    shared.first_positions[consumer] = first_position;
    sync_threads(kConsumerBarrier + consumer, kWarpgroup);

    float shifts[kTiles][2];
    const auto load_shifts = [&](int begin, int end) {
#pragma unroll
      for (int i = begin; i < end; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(&shared.shifts[consumer][8 * i + 2 * (lane % 4)]);
        shifts[i][0] = pair.x;
        shifts[i][1] = pair.y;
      }
    };
    load_shifts(0, Shape::kKeptShifts);
    float scores[kTiles][4];
    const auto start_scores = [&] {
      wait(&shared.k_full[ring.stage], ring.parity);
      await_turn();
      const uint64_t k = advance(k_at, ring.stage * KTile::kSize * static_cast<int>(sizeof(Element)));
      hold(scores);
      fence_products();
#pragma unroll
      for (int column = 0; column < Shape::kDim; column += 16) {
        const int panel = column / 64;
        const int inside = column % 64;
        multiply_async<Element>(scores, advance(k, 2 * (panel * KTile::kPanelSize + inside)),
                                advance(q_at, 2 * (panel * QTile::kPanelSize + inside)), column != 0);
      }
      commit_products();
      pass_turn();
    };
    // `next`: starts the next step's product, if there is one.
    const auto finish_step = [&](int32_t step, const auto& next) {
      load_shifts(Shape::kKeptShifts, kTiles);
      wait_products<0>();
      hold(scores);
      release(&shared.k_empty[ring.stage]);
      ring.advance();
      float sums[kKept];
      sum_probabilities<Shape::kSlot>(sums, scores, shifts, scale_log2, lane);
      next();
      // This lane's sums are of one key, and of every other slot.
      const int fresh = fresh_thread() % kWarpgroup;
      const int32_t key = step * params.steps.keys + fresh / 32 * 16 + fresh % 2 * 8 + fresh % 32 / 4;
      const int own_slot = fresh / 2 % 2;
      // Key m is seen from m d + l - 1 on. Those that a query doesn't see may hold anything.
      if (step >= whole_steps) {
        const int32_t first_position = shared.first_positions[consumer];
        const int64_t seen_from = int64_t{key} * select.block_stride + select.block_size - 1;
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          const auto query = static_cast<int32_t>(params.by_parts.divide(2 * i + own_slot));
          sums[i] = seen_from <= first_position + query ? sums[i] : 0.f;
        }
      }
      wait(&shared.strips_empty[consumer][strips.stage], strips.parity ^ 1);
      float* const strip = &shared.strips[consumer][own_slot][(base + key) & (Shape::kStripRing - 1)];
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        strip[2 * i * Shape::kStripPitch] = sums[i];
      }
      arrive(&shared.strips_full[consumer][strips.stage]);
      strips.advance();
    };
    start_scores();
#pragma unroll 1
    for (int32_t step = 0; step + 1 < tile.steps; ++step) {
      finish_step(step, start_scores);
    }
    finish_step(tile.steps - 1, [&] {
      arrive(&shared.q_empty[consumer]);
      // Where a step has fewer than 64 keys, the rows past them lie where the next step's first do: a warp that still
      // writes the step before must not come later. Elsewhere the turns see to it.
      sync_threads(kConsumerBarrier + consumer, kWarpgroup);
    });
    base += tile.steps * params.steps.keys;
  });
}

// A warp keeps the lists of a half of one consumer's queries.
template <typename Shape>
__device__ inline void rank_select(const SelectSm90Params& params, typename Shape::Shared& shared, int consumer,
                                   int ranker) {
  constexpr int kOfAll = 2 * Shape::kRankers;  // pairs stay together
  const int32_t each = (params.queries + kOfAll - 1) / kOfAll * 2;
  const int32_t first = ranker * each;
  RingPlace<Shape::kStripTiles> strips;
  int32_t base = 0;  // as the consumer's
  for_each_select_tile(params, [&](const SelectSm90Tile& tile) {
    const int32_t first_query = tile.first_query + consumer * params.queries;
    if (first_query >= tile.end_query) {
      return;
    }
    WarpLists<Shape> warp_lists(params, shared, consumer, first, min(params.queries - first, each),
                                tile.place.offset + first_query + first, tile.end_query - first_query - first, base,
                                fresh_thread() % 32);
#pragma unroll 1
    for (int32_t step = 0; step < tile.steps; ++step) {
      wait(&shared.strips_full[consumer][strips.stage], strips.parity);
      warp_lists.rank(step);
      arrive(&shared.strips_empty[consumer][strips.stage]);
      strips.advance();
      warp_lists.merge_full();
    }
    base += tile.steps * params.steps.keys;
    warp_lists.write(
        [&](int query) { return list_of(params.select, tile.place, first_query + first + query, tile.head_kv); });
  });
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    select_blocks_sm90(const __grid_constant__ SelectSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Element = typename Shape::Element;
  constexpr int kWarps = kWarpgroup / 32;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kConsumers; ++i) {
      init_barrier(&shared.q_full[i], 1 + 32);
      init_barrier(&shared.q_empty[i], kWarpgroup);
      for (int j = 0; j < Shape::kStripTiles; ++j) {
        init_barrier(&shared.strips_full[i][j], kWarpgroup);
        init_barrier(&shared.strips_empty[i][j], Shape::kRankers * 32);
      }
    }
    for (int i = 0; i < Shape::kStages; ++i) {
      init_barrier(&shared.k_full[i], 1);
      init_barrier(&shared.k_empty[i], Shape::kConsumers * kWarps);
    }
    fence_barrier_init();
  }
  // Rows that no copy of Q writes.
  if (params.queries * params.select.sequences.group < Shape::kColumns) {
    constexpr int kChunks = Shape::kConsumers * Shape::QTile::kSize * static_cast<int>(sizeof(Element)) / 16;
    for (int i = static_cast<int>(threadIdx.x); i < kChunks; i += Shape::kThreads) {
      reinterpret_cast<uint4*>(shared.q)[i] = uint4{};
    }
    fence_shared_writes();
  }
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kConsumers * Shape::kColumns; i += Shape::kThreads) {
    shared.lse[0][i] = -kMinusInfinity;
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup < Shape::kHelpers) {
    shrink_registers<Shape::kHelperRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int ranker = warp - 2;
    if (warp == 0) {
      if (threadIdx.x == 0) {
        produce_keys<Shape>(params, shared);
      }
    } else if (warp == 1) {
      produce_queries<Shape>(params, shared);
    } else if (ranker < Shape::kConsumers * Shape::kRankers) {
      rank_select<Shape>(params, shared, ranker / Shape::kRankers, ranker % Shape::kRankers);
    }
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    consume_select<Shape>(params, shared, __shfl_sync(0xffffffffu, fresh_thread() / kWarpgroup, 0) - Shape::kHelpers);
  }
#endif
}

}  // namespace nsa
