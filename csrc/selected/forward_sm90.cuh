// Attention over listed blocks, forward, for Hopper: O_t = softmax(scale q_t K^T) V over the keys of token t's blocks.
//
// Every token's own reading of its blocks is bound by what leaves the L2 cache, so 16 consecutive tokens of one KV head
// form a tile that walks the union of their lists once. Blocks of threads are persistent: tile after tile, one KV head
// after the other, so that the keys in use stay in L2. In each,
// - the merging warp joins the tile's lists into steps (block, which of the 16 tokens chose it), a tile ahead;
// - the producer, one thread, copies each step's K and V block into a ring of stages;
// - eight consumer warps own two tokens each: their sums stay in registers, 16 heads of a token being the 16 rows of a
//   matrix instruction. A warp reads the blocks that its tokens chose and passes over the others without a wait.
//
// Shared memory: stages of a K and a V block | Q of 16 tokens, its rows later used for the output | two lists of steps.
#pragma once

#include "selected/union_step_sm90.cuh"

namespace nsa {

// The same number, of which the compiler knows nothing: what is computed from it is not kept in registers meanwhile.
__device__ inline int64_t forget(int64_t number) {
  asm volatile("" : "+l"(number));
  return number;
}

// Starts to copy the Q of a warp's tokens.
template <typename Shape>
__device__ inline void read_queries(const SelectedForwardParams& p, const UnionTile& tile, int warp,
                                    typename Shape::Element* q_data, int lane) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
#pragma unroll 1
  for (int t = 0; t < Shape::kWarpTokens; ++t) {
    const int32_t query = tile.first_query + warp * Shape::kWarpTokens + t;
    QTile{q_data + t * QTile::kSize}.copy_rows(p.q.width, p.q.data, lane, 32, [&](int row) -> const Element* {
      return row < tile.heads && query < tile.place.q_length
                 ? p.q.row<Element>(tile.place.batch, tile.place.q_begin + query, tile.first_head + row)
                 : nullptr;
    });
  }
  commit_copies();
}

// Writes a token's output, by way of the shared memory where its Q was, and its lse.
template <typename Shape>
__device__ inline void write_token(const SelectedForwardParams& p, const UnionTile& tile, int token,
                                   typename Shape::Element* q_data, const TokenSums<Shape::kDimV>& sums,
                                   float scale_log2, int lane) {
  using Element = typename Shape::Element;
  const typename Shape::QTile staging{q_data};
  const int64_t at = tile.place.q_begin + tile.first_query + token;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float total = row_sum(sums.sum[half]);
    const bool empty = sums.maximum[half] == kMinusInfinity;
    store_row<Element>(staging, row, sums.out, half, empty ? 0.f : 1.f / total, lane);
    if (lane % 4 == 0 && row < tile.heads) {
      p.lse.at(tile.place.batch, tile.first_head + row, at) =
          empty ? kMinusInfinity : (sums.maximum[half] * scale_log2 + log2f(total)) * kLn2;
    }
  }
  __syncwarp();
  constexpr int kChunks = Shape::kDimV / kChunk;
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks;
    const int index = i % kChunks;
    if (row < tile.heads && index * kChunk < p.out.width) {
      *reinterpret_cast<uint4*>(p.out.row<Element>(tile.place.batch, at, tile.first_head + row) + index * kChunk) =
          *reinterpret_cast<const uint4*>(staging.chunk(row, index));
    }
  }
}

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    selected_forward_sm90(const __grid_constant__ SelectedForwardSm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;
  using VTile = typename Shape::VTile;
  using QTile = typename Shape::QTile;
  constexpr int kStages = Shape::kStages;
  extern __shared__ __align__(1024) unsigned char union_shared[];
  unsigned char* const shared = union_shared;
  const SelectedForwardParams& p = params.selected;
  unsigned char* const q_begin = shared + kStages * Shape::kStageBytes;
  const int32_t most_steps = Shape::kTokens * p.num_selected;
  auto& barriers = *reinterpret_cast<UnionBarriers<kStages>*>(q_begin + Shape::kQBytes);
  uint32_t* const lists = reinterpret_cast<uint32_t*>(&barriers + 1);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);

  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&barriers.full[i], 1);
      init_barrier(&barriers.empty[i], Shape::kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(&barriers.list_full[i], 1);
      init_barrier(&barriers.list_empty[i], Shape::kWarps + 1);
    }
    barriers.issued = 0;
    fence_barrier_init();
  }
  __syncthreads();

  if (warp >= Shape::kWarps) {
    shrink_registers<40>();
    if (warp == Shape::kWarps && lane == 0) {
      prefetch_map(&params.k);
      prefetch_map(&params.v);
      uint32_t step = 0;  // of all tiles
      uint32_t turn = 0;  // tiles so far
      for (int64_t index = blockIdx.x; index < params.tiles; index += gridDim.x, ++turn) {
        const UnionTile tile = union_tile(p, index, params.tiles);
        const uint32_t* const list = lists + (turn & 1) * most_steps;
        wait(&barriers.list_full[turn & 1], turn / 2 & 1);
        const int32_t steps = barriers.steps[turn & 1];
        for (int32_t i = 0; i < steps; ++i, ++step) {
          const uint32_t stage = step % kStages;
          const uint32_t lap = step / kStages;
          const uint32_t tokens = list[i] & 0xffffu;
          const int needed = __popc((tokens | tokens >> 1) & 0x5555u);
          if (lap > 0) {
            wait(&barriers.empty[stage], (lap - 1) & 1);
          }
          if (needed < Shape::kWarps) {
            arrive(&barriers.empty[stage], Shape::kWarps - needed);
          }
          arrive_expecting(&barriers.full[stage], Shape::kStageBytes);
          unsigned char* const to = shared + stage * Shape::kStageBytes;
          const int32_t token = static_cast<int32_t>(tile.place.k_begin + int64_t{list[i] >> 16} * Shape::kKeys);
#pragma unroll
          for (int panel = 0; panel < KTile::kPanels; ++panel) {
            copy_box(to + panel * KTile::kPanelSize * 2, &params.k, &barriers.full[stage], panel * 64, tile.head_kv,
                     token, static_cast<int32_t>(tile.place.batch), kEvictLast);
          }
#pragma unroll
          for (int panel = 0; panel < VTile::kPanels; ++panel) {
            copy_box(to + KTile::kSize * 2 + panel * VTile::kPanelSize * 2, &params.v, &barriers.full[stage],
                     panel * 64, tile.head_kv, token, static_cast<int32_t>(tile.place.batch), kEvictLast);
          }
          publish(&barriers.issued, step + 1);
        }
        arrive(&barriers.list_empty[turn & 1]);
      }
    } else if (warp == Shape::kWarps + 1) {
      uint32_t turn = 0;
      for (int64_t index = blockIdx.x; index < params.tiles; index += gridDim.x, ++turn) {
        if (turn >= 2) {
          wait(&barriers.list_empty[turn & 1], (turn / 2 - 1) & 1);
        }
        const int32_t steps = merge_lists(lists + (turn & 1) * most_steps, p, union_tile(p, index, params.tiles), lane);
        if (lane == 0) {
          barriers.steps[turn & 1] = steps;
          arrive(&barriers.list_full[turn & 1]);
        }
        __syncwarp();
      }
    }
  } else {
    grow_registers<232>();
    Element* const q_data = reinterpret_cast<Element*>(q_begin) + warp * Shape::kWarpTokens * QTile::kSize;
    const uint32_t ring = shared_address(shared);
    const bool negative = p.scale < 0.f;
    const float scale_log2 = fabsf(p.scale) * kLog2E;
    uint32_t before = 0;  // steps of the tiles so far
    uint32_t turn = 0;
    uint32_t issued = 0;
    for (int64_t index = blockIdx.x; index < params.tiles; index += gridDim.x, ++turn) {
      int32_t limits[Shape::kWarpTokens];
      {
        const UnionTile tile = union_tile(p, index, params.tiles);
        read_queries<Shape>(p, tile, warp, q_data, lane);
#pragma unroll
        for (int t = 0; t < Shape::kWarpTokens; ++t) {
          limits[t] = tile.limit(warp * Shape::kWarpTokens + t);
        }
      }
      TokenSums<Shape::kDimV> sums[Shape::kWarpTokens];
#pragma unroll
      for (int t = 0; t < Shape::kWarpTokens; ++t) {
        sums[t].reset();
      }
      wait(&barriers.list_full[turn & 1], turn / 2 & 1);
      const int32_t steps = barriers.steps[turn & 1];
      const uint32_t* const list = lists + (turn & 1) * most_steps;
      wait_copies<0>();
      __syncwarp();
      for (int32_t first = 0; first < steps; first += 32) {
        const uint32_t own = first + lane < steps ? list[first + lane] : 0;
        uint32_t chosen = __ballot_sync(0xffffffffu, (own >> (2 * warp) & 3) != 0);
        while (chosen != 0) {
          const int at = __ffs(static_cast<int>(chosen)) - 1;
          chosen &= chosen - 1;
          const uint32_t entry = __shfl_sync(0xffffffffu, own, at);
          const uint32_t step = before + first + at;
          const uint32_t stage = step % kStages;
          if (issued <= step) {
            wait_until([&] { return (issued = observe(&barriers.issued)) > step; });
          }
          wait(&barriers.full[stage], step / kStages & 1);
          const KTile k_tile{ring + stage * Shape::kStageBytes};
          const VTile v_tile{k_tile.begin + KTile::kSize * 2};
          const int32_t key = static_cast<int32_t>(entry >> 16) * Shape::kKeys;
          const uint32_t tokens = entry >> (2 * warp) & 3;
          const bool whole = key + Shape::kKeys <= min((tokens & 1) != 0 ? limits[0] : 0x7fffffff,
                                                       (tokens & 2) != 0 ? limits[1] : 0x7fffffff);
          if (!whole) {
            if ((tokens & 1) != 0) {
              union_step<Shape, 0, 1, true>(sums, q_data, k_tile, v_tile, limits[0] - key, scale_log2, negative, lane);
            }
            if ((tokens & 2) != 0) {
              union_step<Shape, 1, 1, true>(sums, q_data, k_tile, v_tile, limits[1] - key, scale_log2, negative, lane);
            }
          } else if (tokens == 3) {
            union_step<Shape, 0, 2, false>(sums, q_data, k_tile, v_tile, 0, scale_log2, negative, lane);
          } else if (tokens == 1) {
            union_step<Shape, 0, 1, false>(sums, q_data, k_tile, v_tile, 0, scale_log2, negative, lane);
          } else {
            union_step<Shape, 1, 1, false>(sums, q_data, k_tile, v_tile, 0, scale_log2, negative, lane);
          }
          __syncwarp();
          if (lane == 0) {
            arrive(&barriers.empty[stage]);
          }
        }
      }
      before += steps;
      if (lane == 0) {
        arrive(&barriers.list_empty[turn & 1]);
      }
      const UnionTile tile = union_tile(p, forget(index), params.tiles);
#pragma unroll
      for (int t = 0; t < Shape::kWarpTokens; ++t) {
        const int token = warp * Shape::kWarpTokens + t;
        if (tile.first_query + token < tile.place.q_length) {
          write_token<Shape>(p, tile, token, q_data + t * QTile::kSize, sums[t], scale_log2, lane);
        }
      }
      __syncwarp();
    }
  }
#endif
}

}  // namespace nsa
