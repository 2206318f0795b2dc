// How a block of threads walks unions of lists: who copies, who merges, and what the consumers wait for.
//
// Blocks of threads are persistent: tile after tile, one KV head after the other, so that the keys in use stay in L2.
// - The merging warp joins the tile's lists into steps (block, which tokens chose it), a tile ahead.
// - The producer, one thread, copies each step's K and V block into a ring of stages.
// - Consumer warpgroups own 64 rows each. They take the blocks that one of their tokens chose and pass over the others
//   without a wait. Each fetches its own rows of Q, and of the gradient, as soon as the tile before is done with.
#pragma once

#include "selected/union_sm90.cuh"

namespace nsa {

// This thread's lane, read anew: what is computed from it is not kept in registers meanwhile.
__device__ inline int fresh_lane() { return fresh_thread() & 31; }

// What a group's tokens see.
struct UnionSeen {
  int32_t first_limit;  // keys that the first token would see if keys had no end: the next tokens see one more each
  int32_t k_length;

  __device__ int32_t limit(int token) const { return min(first_limit + token, k_length); }
};

template <typename Shape>
__device__ inline void start_union(const UnionShared<Shape>& shared) {
  if (threadIdx.x == 0) {
    auto& barriers = *shared.barriers;
    for (int i = 0; i < Shape::kStagesK; ++i) {
      init_barrier(&barriers.k_full[i], 1);
      init_barrier(&barriers.k_empty[i], Shape::kWarps);
    }
    for (int i = 0; i < Shape::kStagesV; ++i) {
      init_barrier(&barriers.v_full[i], 1);
      init_barrier(&barriers.v_empty[i], Shape::kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(&barriers.list_full[i], 1);
      init_barrier(&barriers.list_empty[i], Shape::kWarps + 1);
    }
    for (int i = 0; i < Shape::kGroups; ++i) {
      init_barrier(&barriers.rows_full[i], 1);
      init_barrier(&barriers.rows_empty[i], 4);
    }
    barriers.issued = 0;
    fence_barrier_init();
  }
  __syncthreads();
}

// Copies every step's blocks. By one thread.
template <typename Shape>
__device__ inline void produce_union(const UnionParams& u, const UnionShared<Shape>& shared) {
  auto& barriers = *shared.barriers;
  prefetch_map(&u.k);
  prefetch_map(&u.v);
  const int group_tokens = group_tokens_of<Shape>(u);
  uint32_t step = 0;  // of all tiles
  uint32_t turn = 0;  // tiles so far
  for (int32_t index = blockIdx.x; index < u.tiles; index += gridDim.x, ++turn) {
    const UnionTile tile = union_tile<Shape>(u, index);
    const typename Shape::Step* const list = shared.lists + (turn & 1) * shared.most_steps;
    wait(&barriers.list_full[turn & 1], turn / 2 & 1);
    const int32_t steps = barriers.steps[turn & 1];
    // Copies panels for a step that `needed` warps take.
    const auto copy = [&]<typename Panels>(Panels, const CUtensorMap* map, unsigned char* ring, Barrier* full,
                                           Barrier* empty, uint32_t stages, int needed, int32_t head, int32_t token) {
      const uint32_t stage = step % stages;
      const uint32_t lap = step / stages;
      if (lap > 0) {
        wait(&empty[stage], (lap - 1) & 1);
      }
      if (needed < Shape::kWarps) {
        arrive(&empty[stage], Shape::kWarps - needed);
      }
      if (map == nullptr) {
        arrive(&full[stage]);
        return;
      }
      arrive_expecting(&full[stage], Panels::kSize * 2);
#pragma unroll
      for (int panel = 0; panel < Panels::kPanels; ++panel) {
        copy_box(ring + stage * (Panels::kSize * 2) + panel * Panels::kPanelSize * 2, map, &full[stage], panel * 64,
                 head, token, static_cast<int32_t>(tile.place.batch), kEvictLast);
      }
    };
    const auto copy_both = [&](const CUtensorMap* k, const CUtensorMap* v, int needed, int32_t head, int32_t token) {
      const auto copy_k = [&] {
        copy(typename Shape::KTile(), k, shared.k, barriers.k_full, barriers.k_empty, Shape::kStagesK, needed, head,
             token);
      };
      const auto copy_v = [&] {
        copy(typename Shape::VTile(), v, shared.v, barriers.v_full, barriers.v_empty, Shape::kStagesV,
             v == nullptr ? 0 : needed, head, token);
      };
      if constexpr (Shape::kGradients) {  // in the order of their first use
        copy_v();
        copy_k();
      } else {
        copy_k();
        copy_v();
      }
      publish(&barriers.issued, ++step);
    };
#pragma unroll 1
    for (int group = 0; group < Shape::kRowSteps; ++group) {
      copy_both(&u.q, Shape::kGradients ? &u.grad_out : nullptr, 4, tile.first_head,
                static_cast<int32_t>(tile.place.q_begin) + tile.first_query + group * group_tokens);
    }
    for (int32_t i = 0; i < steps; ++i) {
      const int32_t block = static_cast<int32_t>(list[i] >> Shape::kTokenBits);
      int needed = 0;
#pragma unroll
      for (int group = 0; group < Shape::kGroups; ++group) {
        const uint32_t tokens = tokens_of_group<Shape>(list[i], group, group_tokens);
        const uint32_t warps = group_tokens == 4 ? tokens : (tokens | tokens >> 1) & 0x55;
        needed += tokens == 0 ? 0
                  : taken_alone<Shape>(tokens, group_tokens, block, tile.limit(group * group_tokens), steps)
                      ? __popc(warps)
                      : 4;
      }
      copy_both(&u.k, &u.v, needed, tile.head_kv,
                static_cast<int32_t>(tile.place.k_begin + int64_t{block} * Shape::kKeys));
    }
    arrive(&barriers.list_empty[turn & 1]);
  }
}

// The blocks of a step, as a consumer warp gets and drains them.
template <typename Shape>
struct UnionRing {
  UnionShared<Shape> shared;
  bool first_lane;
  uint32_t issued;  // what the warp knows of it

  __device__ void await(Barrier* full, uint32_t step, uint32_t stages) {
    if (issued <= step) {
      wait_until([&] { return (issued = observe(&shared.barriers->issued)) > step; });
    }
    wait(&full[step % stages], step / stages & 1);
  }
  __device__ typename Shape::KTile wait_k(uint32_t step) {
    await(shared.barriers->k_full, step, Shape::kStagesK);
    return {shared_address(shared.k) + step % Shape::kStagesK * Shape::kBytesK};
  }
  __device__ typename Shape::VTile wait_v(uint32_t step) {
    await(shared.barriers->v_full, step, Shape::kStagesV);
    return {shared_address(shared.v) + step % Shape::kStagesV * Shape::kBytesV};
  }
  __device__ void release(Barrier* empty) const {
    __syncwarp();
    if (first_lane) {
      arrive(empty);
    }
  }
  __device__ void release_k(uint32_t step) const { release(&shared.barriers->k_empty[step % Shape::kStagesK]); }
  __device__ void release_v(uint32_t step) const { release(&shared.barriers->v_empty[step % Shape::kStagesV]); }
};

// Writes every tile's list. By one warp.
template <typename Shape>
__device__ inline void merge_unions(const UnionParams& u, const UnionShared<Shape>& shared) {
  auto& barriers = *shared.barriers;
  const int lane = fresh_lane();
  uint32_t turn = 0;
  for (int32_t index = blockIdx.x; index < u.tiles; index += gridDim.x, ++turn) {
    if (turn >= 2) {
      wait(&barriers.list_empty[turn & 1], (turn / 2 - 1) & 1);
    }
    const int32_t steps = merge_lists<Shape>(shared.lists + (turn & 1) * shared.most_steps, u,
                                             union_tile<Shape>(u, index), lane);
    if (lane == 0) {
      barriers.steps[turn & 1] = steps;
      arrive(&barriers.list_full[turn & 1]);
    }
    __syncwarp();
  }
}

// Starts to copy a group's rows of a tile. By one thread.
template <typename Shape>
__device__ inline void fetch_rows(const UnionParams& u, const UnionShared<Shape>& shared, int group, int32_t index) {
  using QTile = typename Shape::QTile;
  using GradOutTile = typename Shape::GradOutTile;
  const UnionTile tile = union_tile<Shape>(u, index);
  Barrier* const full = &shared.barriers->rows_full[group];
  unsigned char* const to = shared.rows + group * Shape::kGroupBytes;
  const int32_t token = static_cast<int32_t>(tile.place.q_begin) + tile.first_query + group * group_tokens_of<Shape>(u);
  const int32_t batch = static_cast<int32_t>(tile.place.batch);
  arrive_expecting(full, Shape::kGroupBytes);
#pragma unroll
  for (int panel = 0; panel < QTile::kPanels; ++panel) {
    copy_box(to + panel * QTile::kPanelSize * 2, &u.q, full, 64 * panel, tile.first_head, token, batch, kEvictFirst);
  }
  if constexpr (Shape::kGradients) {
#pragma unroll
    for (int panel = 0; panel < GradOutTile::kPanels; ++panel) {
      copy_box(to + QTile::kSize * 2 + panel * GradOutTile::kPanelSize * 2, &u.grad_out, full, 64 * panel,
               tile.first_head, token, batch, kEvictFirst);
    }
  }
}

// A consumer warp's step.
struct UnionStep {
  uint32_t number;  // among all of this block of threads
  int32_t key;      // the block's first
  uint32_t tokens;  // of the group, that chose it
  bool alone;       // whether each warp takes it for itself
  bool more;        // whether the group's next step is near, and taken together like this one
};

// A consumer warp's walk. begin(tile), then take(step, what the tokens see) for each step that is its, then end(tile).
// Few registers are left to it: what can be had again from shared memory is not kept.
template <typename Shape, typename Begin, typename TakeRows, typename Take, typename End>
__device__ inline void consume_unions(const UnionParams& u, const UnionShared<Shape>& shared, int group, int warp,
                                      const Begin& begin, const TakeRows& take_rows, const Take& take,
                                      const End& end) {
  auto& barriers = *shared.barriers;
  const auto fetches = [&] { return (fresh_thread() & 127) == 0; };
  if (!Shape::kRowsInRing && fetches() && blockIdx.x < u.tiles) {
    prefetch_map(&u.q);
    fetch_rows(u, shared, group, blockIdx.x);
  }
  const int group_tokens = group_tokens_of<Shape>(u);
  const uint32_t own = group_tokens == 4 ? 1u << warp : 3u << 2 * warp;
  uint32_t before = 0;  // steps of the tiles so far
  uint32_t turn = 0;    // tiles so far
  const auto index_of = [&](uint32_t number) { return static_cast<int32_t>(blockIdx.x + number * gridDim.x); };
  for (; index_of(turn) < u.tiles; ++turn) {
    UnionSeen seen;
    {
      const UnionTile tile = union_tile<Shape>(u, index_of(turn));
      seen.first_limit = tile.place.offset + tile.first_query + group * group_tokens + 1;
      seen.k_length = tile.place.k_length;
      begin(tile);
    }
    wait(&barriers.list_full[turn & 1], turn / 2 & 1);
    if constexpr (Shape::kRowsInRing) {
      take_rows(__shfl_sync(0xffffffffu, before + group, 0));
      before += Shape::kRowSteps;
    } else {
      wait(&barriers.rows_full[group], turn & 1);
    }
    const int32_t steps = barriers.steps[turn & 1];
    for (int32_t first = 0; first < steps; first += 32) {
      uint32_t chosen = 0;    // by this warp's tokens
      uint32_t together = 0;  // steps of the group that its warps take together
      uint32_t alone = 0;     // and those that they do not
      typename Shape::Step entry = 0;
      {
        const int at = first + fresh_lane();
        entry = at < steps ? shared.lists[(turn & 1) * shared.most_steps + at] : 0;
        const uint32_t tokens = tokens_of_group<Shape>(entry, group, group_tokens);
        const bool each = taken_alone<Shape>(tokens, group_tokens, static_cast<int32_t>(entry >> Shape::kTokenBits),
                                             seen.limit(0), steps);
        together = __ballot_sync(0xffffffffu, tokens != 0 && !each);
        alone = __ballot_sync(0xffffffffu, tokens != 0 && each);
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
        constexpr int kNear = (Shape::kStagesK < Shape::kStagesV ? Shape::kStagesK : Shape::kStagesV) - 1;
        const uint32_t next = (together | alone) & -2u << at;  // later steps, the nearest of which
        step.more = (together & next & -next & ((2u << kNear) - 1) << at) != 0;
        take(step, seen);
      }
    }
    before += steps;
    __syncwarp();
    if (fresh_lane() == 0) {
      arrive(&barriers.list_empty[turn & 1]);
      if constexpr (!Shape::kRowsInRing) {
        arrive(&barriers.rows_empty[group]);
      }
    }
    if (!Shape::kRowsInRing && fetches() && index_of(turn + 1) < u.tiles) {
      wait(&barriers.rows_empty[group], turn & 1);
      fetch_rows(u, shared, group, index_of(turn + 1));
    }
    __syncwarp();
    end(union_tile<Shape>(u, index_of(turn)));
  }
}

// Of a group's rows: which token, counted within the group, and which head.
struct UnionRow {
  int token;
  int head;
};
template <typename Shape>
__device__ inline UnionRow union_row(const UnionParams& u, int warp, int half, int lane) {
  const int row = 16 * warp + 8 * half + lane / 4;
  return head_slots_of<Shape>(u) == 16 ? UnionRow{row / 16, row % 16} : UnionRow{row / 8, row % 8};
}

__device__ inline uint4 load_shared(uint32_t from) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from)
               : "memory");
  return value;
}
__device__ inline void store_shared(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Rows of a tile from `count` on become zeros: what lies there need not be finite. By a warpgroup; `barrier` is its.
template <typename Tile>
__device__ inline void clear_rows(const Tile& tile, int count, int barrier) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
#pragma unroll 1
  for (int i = 8 * count + thread; i < 8 * Tile::kRows; i += kWarpgroup) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      store_shared(tile.begin + panel * Tile::kPanelSize * 2 + 16 * i, uint4{});
    }
  }
  fence_shared_writes();
  sync_threads(barrier, kWarpgroup);
}

// Writes one of the lane's two rows, times `factor`: the four lanes of a row trade their pairs of columns for chunks of
// 16 bytes. `to` is where column `first` of the row begins, or null; columns up to `width` exist.
template <typename Element, int kTiles>
__device__ inline void write_sums(Element* to, int32_t width, const float (&c)[kTiles][4], int half, float factor,
                                  bool add, int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; i += 4) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = pack<Element>(c[i + j][2 * half] * factor, c[i + j][2 * half + 1] * factor);
    }
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = (lane & bit) != 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((j & bit) == 0) {
          const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[j] : words[j | bit], bit);
          (upper ? words[j] : words[j | bit]) = got;
        }
      }
    }
    const int column = 8 * (i + lane % 4);
    if (to != nullptr && column < width) {
      uint4* const address = reinterpret_cast<uint4*>(to + column);
      const uint4 value = make_uint4(words[0], words[1], words[2], words[3]);
      *address = add ? add_chunks<Element>(value, *address) : value;
    }
  }
}

}  // namespace nsa
