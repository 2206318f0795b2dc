// How a block of threads walks unions of lists: who copies, who merges, and what the consumers wait for.
//
// Blocks of threads are persistent: tile after tile, one KV head after the other, so that the keys in use stay in L2.
// - The merging warp joins the tile's lists into steps (block, which tokens chose it), a tile ahead.
// - Two producers, a thread each, copy each step's K and V block into two rings of buffers. Before the steps of a list
//   come as many as there are warpgroups, whose K and V are a warpgroup's Q and gradient of the output. (kOnlyKeys: no
//   V, and no such steps.)
// - Consumer warpgroups own 64 rows each. They take the blocks that one of their tokens chose and pass over the others
//   without a wait.
#pragma once

#include "selected/sm90/union_rows.cuh"

namespace nsa {

// What a group's tokens see.
struct UnionSeen {
  int32_t first_limit;  // keys that the first token would see if keys had no end: the next tokens see one more each
  int32_t k_length;

  __device__ int32_t limit(int token) const { return min(first_limit + token, k_length); }
  // Keys of blocks that a warp may take alone: others need a mask or, where scores come masked, cleared rows.
  template <typename Shape>
  __device__ int32_t limit_alone() const {
    return Shape::kOnlyKeys ? k_length : limit(0);
  }
};

template <typename Shape>
__device__ inline void start_union(const UnionShared<Shape>& shared) {
  if (threadIdx.x == 0) {
    auto& barriers = *shared.barriers;
    for (int i = 0; i < Shape::kStagesK; ++i) {
      init_barrier(&barriers.k_full[i], 1);
      init_barrier(&barriers.k_empty[i], Shape::kWarps * 32);
    }
    for (int i = 0; i < Shape::kStagesV; ++i) {
      init_barrier(&barriers.v_full[i], 1);
      init_barrier(&barriers.v_empty[i], Shape::kWarps * 32);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(&barriers.list_full[i], 32);
      init_barrier(&barriers.list_empty[i], Shape::kWarps * 32 + (Shape::kOnlyKeys ? 1 : 2));
    }
    barriers.issued[0] = barriers.issued[1] = 0;
    for (int i = 0; i < Shape::kWarps; ++i) {
      barriers.turns[i] = 0;
    }
    fence_barrier_init();
  }
  __syncthreads();
}

// Copies every step's K, or V. By one thread each: the time that a step takes of it is the least that steps are apart.
template <bool kIsK, typename Shape>
__device__ inline void produce_union(const UnionParams& u, const UnionShared<Shape>& shared) {
  using Panels = std::conditional_t<kIsK, typename Shape::KTile, typename Shape::VTile>;
  constexpr uint32_t kStages = kIsK ? Shape::kStagesK : Shape::kStagesV;
  constexpr uint32_t kBytes = Panels::kSize * 2;
  auto& barriers = *shared.barriers;
  Barrier* const full = kIsK ? barriers.k_full : barriers.v_full;
  Barrier* const empty = kIsK ? barriers.k_empty : barriers.v_empty;
  unsigned char* const ring = kIsK ? shared.k : shared.v;
  const CUtensorMap* const map = kIsK ? &u.k : &u.v;
  const CUtensorMap* const rows_map = kIsK ? &u.q : &u.grad_out;
  const int group_tokens = group_tokens_of<Shape>(u);
  RingPlace<kStages> place;
  uint32_t turn = 0;  // tiles so far
  // Waits until the buffer is free. `absent`: warps that have no part in the step.
  const auto begin = [&](int absent) {
    wait(&empty[place.stage], place.parity ^ 1);
    raise(&barriers.issued[kIsK ? 0 : 1]);
    if (absent != 0) {
      arrive(&empty[place.stage], absent * 32);
    }
  };
  const auto copy = [&](const CUtensorMap* from, int32_t head, int32_t token, int32_t batch) {
    arrive_expecting(&full[place.stage], kBytes);
#pragma unroll
    for (int panel = 0; panel < Panels::kPanels; ++panel) {
      copy_box(ring + place.stage * kBytes + panel * Panels::kPanelSize * 2, from, &full[place.stage], panel * 64, head,
               token, batch, kEvictLast);
    }
  };
  for (int32_t index = u.first_tile + blockIdx.x; index < u.end_tile; index += gridDim.x, ++turn) {
    const UnionTile tile = union_tile<Shape>(u, index);
    const int32_t batch = static_cast<int32_t>(tile.place.batch);
#pragma unroll 1
    for (int group = 0; group < (Shape::kOnlyKeys ? 0 : Shape::kGroups); ++group) {
      if constexpr (kIsK || Shape::kGradients) {
        begin(Shape::kWarps - 4);
        copy(rows_map, tile.first_head,
             static_cast<int32_t>(tile.place.q_begin) + tile.first_query + group * group_tokens, batch);
      } else {
        begin(Shape::kWarps);
        arrive(&full[place.stage]);
        wait(&full[place.stage], place.parity);  // complete at once, and nobody else looks at it
      }
      place.advance();
    }
    wait(&barriers.list_full[turn & 1], turn / 2 & 1);
    const typename Shape::Step* next = shared.list(turn);
    const typename Shape::Step* const last = next + barriers.steps[turn & 1];
    const int32_t k_begin = static_cast<int32_t>(tile.place.k_begin);
#pragma unroll 1
    for (; next != last; ++next) {
      const typename Shape::Step entry = *next;
      begin(static_cast<int>(entry >> Shape::kAbsentBit) & 0xf);
      copy(map, tile.head_kv, k_begin + static_cast<int32_t>(entry >> Shape::kTokenBits) * Shape::kKeys, batch);
      place.advance();
    }
    arrive(&barriers.list_empty[turn & 1]);
  }
}

// The blocks of a step, as a consumer warp gets and drains them.
template <typename Shape>
struct UnionRing {
  UnionShared<Shape> shared;

  // `issued` is read anew each time: registers are few.
  __device__ void await(Barrier* full, const uint32_t* issued, uint32_t step, uint32_t stages) const {
    wait_until([&] { return observe(issued) > step; });
    wait(&full[step % stages], step / stages & 1);
  }
  __device__ typename Shape::KTile wait_k(uint32_t step) const {
    await(shared.barriers->k_full, &shared.barriers->issued[0], step, Shape::kStagesK);
    return {shared_address(shared.k) + step % Shape::kStagesK * Shape::kBytesK};
  }
  __device__ typename Shape::VTile wait_v(uint32_t step) const {
    await(shared.barriers->v_full, &shared.barriers->issued[1], step, Shape::kStagesV);
    return {shared_address(shared.v) + step % Shape::kStagesV * Shape::kBytesV};
  }
  // Gives a buffer back. `loaded`: a number that depends on all that the warp loaded from it by ldmatrix. None is
  // needed behind the end of a branch in which all that was loaded is multiplied.
  __device__ void release_k(uint32_t step, uint32_t loaded = 0) const {
    release(&shared.barriers->k_empty[step % Shape::kStagesK], loaded);
  }
  __device__ void release_v(uint32_t step, uint32_t loaded = 0) const {
    release(&shared.barriers->v_empty[step % Shape::kStagesV], loaded);
  }
  __device__ void release(Barrier* empty, uint32_t loaded) const {
    if (fresh_thread() >= 0) {  // always: without the branch ptxas spills registers
      arrive_loaded(empty, loaded);
    }
  }
};

// Writes every tile's list. By one warp.
template <typename Shape>
__device__ inline void merge_unions(const UnionParams& u, const UnionShared<Shape>& shared) {
  auto& barriers = *shared.barriers;
  const int lane = fresh_lane();
  uint32_t turn = 0;
  for (int32_t index = u.first_tile + blockIdx.x; index < u.end_tile; index += gridDim.x, ++turn) {
    if (turn >= 2) {
      wait(&barriers.list_empty[turn & 1], (turn / 2 - 1) & 1);
    }
    const int32_t steps = merge_lists<Shape>(shared, turn, u, lane);
    if (lane == 0) {
      barriers.steps[turn & 1] = steps;
    }
    arrive(&barriers.list_full[turn & 1]);
  }
}

// The grid's size, read anew.
__device__ inline uint32_t fresh_grid() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;\n" : "=r"(blocks));
  return blocks;
}

// What the warps of the producing warpgroup do.
template <typename Shape>
__device__ inline void feed_unions(const UnionParams& u, const UnionShared<Shape>& shared, int warp) {
  if (warp == 1) {
    merge_unions(u, shared);
  } else if (warp != 3 && elect_one()) {
    if (warp == 0) {
      produce_union<true>(u, shared);
    } else if constexpr (!Shape::kOnlyKeys) {
      produce_union<false>(u, shared);
    }
  }
}

// A consumer warp's step.
struct UnionStep {
  uint32_t number;  // among all of this block of threads
  int32_t key;      // the block's first
  uint32_t tokens;  // of the group, that chose it
  bool alone;       // whether each warp takes it for itself
};

// A consumer warp's walk. begin(tile), take_rows(number of the step that holds them), then take(step, what the tokens
// see) for each step that is its, then end(tile).
template <typename Shape, typename Begin, typename TakeRows, typename Take, typename End>
__device__ inline void consume_unions(const UnionParams& u, const UnionShared<Shape>& shared, int group, int warp,
                                      const Begin& begin, const TakeRows& take_rows, const Take& take, const End& end) {
  auto& barriers = *shared.barriers;
  const int group_tokens = group_tokens_of<Shape>(u);
  uint32_t before = 0;  // steps of the tiles so far
  // Tiles so far: kept in shared memory, for registers are few.
  uint32_t* const turns = &barriers.turns[4 * group + warp];
  const auto turn = [&] { return observe(turns); };
  const auto index = [&] {
    return static_cast<int32_t>(u.first_tile + blockIdx.x + turn() * (Shape::kOnlyKeys ? fresh_grid() : gridDim.x));
  };
  while (index() < u.end_tile) {
    UnionSeen seen;
    {
      const UnionTile tile = union_tile<Shape>(u, index());
      seen.first_limit = tile.place.offset + tile.first_query + group * group_tokens + 1;
      seen.k_length = tile.place.k_length;
      begin(tile);
    }
    wait(&barriers.list_full[turn() & 1], turn() / 2 & 1);
    if constexpr (!Shape::kOnlyKeys) {
      take_rows(__shfl_sync(0xffffffffu, before + group, 0));
      before += Shape::kGroups;
    }
    const int32_t steps = barriers.steps[turn() & 1];
    for (int32_t first = 0; first < steps; first += 32) {
      uint32_t together = 0;  // steps that the group's warps take together
      uint32_t chosen = 0;    // those, and the steps of this warp's tokens
      typename Shape::Step entry = 0;
      {
        const int at = first + fresh_lane();
        entry = at < steps ? shared.list(turn())[at] : 0;
        const uint32_t tokens = tokens_of_group<Shape>(entry, group, group_tokens);
        const bool alone = taken_alone<Shape>(tokens, group_tokens, static_cast<int32_t>(entry >> Shape::kTokenBits),
                                              seen.template limit_alone<Shape>());
        together = __ballot_sync(0xffffffffu, tokens != 0 && !alone);
        const int own_warp = fresh_thread() / 32 % 4;
        const uint32_t own = tokens_of_warp(group_tokens, own_warp);
        chosen = together | __ballot_sync(0xffffffffu, (tokens & own) != 0);
      }
      while (chosen != 0) {
        const int at = __ffs(static_cast<int>(chosen)) - 1;
        chosen &= chosen - 1;
        const typename Shape::Step own_entry = __shfl_sync(0xffffffffu, entry, at);
        UnionStep step;
        step.number = __shfl_sync(0xffffffffu, before + first + at, 0);  // uniform, as the compiler sees then
        step.key = static_cast<int32_t>(own_entry >> Shape::kTokenBits) * Shape::kKeys;
        step.tokens = tokens_of_group<Shape>(own_entry, group, group_tokens);
        step.alone = (together >> at & 1) == 0;
        take(step, seen);
      }
    }
    before += steps;
    if (fresh_thread() >= 0) {  // always: without the branch ptxas spills registers
      arrive(&barriers.list_empty[turn() & 1]);
    }
    end(union_tile<Shape>(u, index()));
    __syncwarp();
    if (fresh_lane() == 0) {
      publish(turns, turn() + 1);
    }
    __syncwarp();
  }
}

// A block of threads: its warps feed, or are consumers: consume(shared, group, warp of the group).
template <typename Shape, typename Consume>
__device__ inline void run_unions(const UnionParams& u, const Consume& consume) {
  extern __shared__ __align__(1024) unsigned char union_shared[];
  const UnionShared<Shape> shared(union_shared, u);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  start_union(shared);
  if (warp >= Shape::kWarps) {
    shrink_registers<Shape::kProducerRegisters>();
    feed_unions(u, shared, warp - Shape::kWarps);
  } else {
    grow_registers<Shape::kConsumerRegisters>();
    consume(shared, warp / 4, warp % 4);
  }
}

}  // namespace nsa
