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

#include "common/copy_sm90.cuh"
#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "selected/params.h"

namespace nsa {

template <typename Element_, int kDimK_, int kDimV_, int kStages_>
struct SelectedForwardSm90Shape {
  using Element = Element_;
  static constexpr int kDimK = kDimK_;
  static constexpr int kDimV = kDimV_;
  static constexpr int kStages = kStages_;
  static constexpr int kKeys = 64;
  static constexpr int kPartKeys = 32;  // that a warp takes at once: more need more registers than there are
  static constexpr int kTokens = 16;
  static constexpr int kWarpTokens = 2;
  static constexpr int kHeads = 16;
  static constexpr int kWarps = kTokens / kWarpTokens;  // consumers
  static constexpr int kThreads = 32 * kWarps + 128;
  using QTile = SharedTile<Element, kHeads, kDimK>;
  using KTile = PanelTile<Element, kKeys, kDimK>;
  using VTile = PanelTile<Element, kKeys, kDimV>;
  static constexpr int kStageBytes = (KTile::kSize + VTile::kSize) * sizeof(Element);
  static constexpr int kQBytes = kTokens * QTile::kSize * sizeof(Element);
  static_assert(kDimV <= kDimK);  // the output lies where Q was
};

// A step in one word. Blocks are numbers below 2^16.
__device__ inline uint32_t pack_step(int32_t block, uint32_t tokens) {
  return (static_cast<uint32_t>(block) << 16) | tokens;
}
constexpr int32_t kMostUnionBlocks = 1 << 16;

template <int kStages>
struct UnionBarriers {
  Barrier full[kStages];   // filled by the copies of a step, watched by the warps that need it
  Barrier empty[kStages];  // drained by those warps; the producer arrives for the others
  Barrier list_full[2];    // written by the merging warp
  Barrier list_empty[2];   // read by the consumers and the producer
  uint32_t issued;         // steps whose copies are under way or done: before that, `full` may be two phases behind
  int32_t steps[2];        // of each list
};

template <typename Shape>
constexpr int64_t selected_forward_sm90_shared_bytes(int32_t num_selected) {
  return Shape::kStages * Shape::kStageBytes + Shape::kQBytes + int64_t{2} * Shape::kTokens * num_selected * 4 +
         sizeof(UnionBarriers<Shape::kStages>);
}

struct SelectedForwardSm90Params {
  SelectedForwardParams selected;
  int64_t tiles;  // slots of 16 tokens, times Hkv, times tiles of 16 heads
  CUtensorMap k;  // boxes of 64 columns, 64 tokens
  CUtensorMap v;
};

// 16 tokens of one sequence and up to 16 heads of one KV head.
struct UnionTile {
  SequencePlace place;
  int32_t first_query;
  int32_t head_kv;
  int32_t first_head;  // among all query heads
  int32_t heads;

  // Keys before this are seen by the tile's token: none where there is no such token.
  __device__ int32_t limit(int token) const {
    const int32_t query = first_query + token;
    return query < place.q_length ? min(place.offset + query + 1, place.k_length) : 0;
  }
};

__device__ inline UnionTile union_tile(const SelectedForwardParams& p, int64_t index, int64_t tiles) {
  const Sequences& s = p.sequences;
  const int32_t head_tiles = (s.group + 15) / 16;
  const int64_t slots = tiles / (int64_t{s.heads_kv} * head_tiles);
  const int64_t slot = index % (slots * head_tiles) / head_tiles;
  const int32_t head_tile = static_cast<int32_t>(index % head_tiles);
  const Tile tile = find_tile(s, s.cumulative_q, 1, s.length_q, 16, slot);
  UnionTile result;
  result.place = place_of(s, tile.sequence);
  result.first_query = tile.index * 16;
  result.head_kv = static_cast<int32_t>(index / (slots * head_tiles));
  result.first_head = result.head_kv * s.group + head_tile * 16;
  result.heads = min(16, s.group - head_tile * 16);
  return result;
}

// Joins the lists of a tile's tokens, lane i holding token i's, by taking the lowest of all heads over and over. What
// begins past what a token sees is left out. Returns how many steps it wrote.
__device__ inline int32_t merge_lists(uint32_t* to, const SelectedForwardParams& p, const UnionTile& tile, int lane) {
  constexpr int32_t kNone = 0x7fffffff;
  const int32_t limit = lane < 16 ? tile.limit(lane) : 0;
  const int64_t token = tile.place.batch * p.sequences.length_q + tile.place.q_begin + tile.first_query + lane;
  const int32_t* next = p.block_indices + (token * p.sequences.heads_kv + tile.head_kv) * p.num_selected;
  const int32_t* const end = limit > 0 ? next + p.num_selected : next;
  const auto take = [&] {
    while (next != end) {
      const int32_t block = *next++;
      if (block >= 0 && int64_t{block} * p.select_size < limit) {
        return block;
      }
    }
    return kNone;
  };
  int32_t head = take();
  int32_t steps = 0;
  while (true) {
    const int32_t block = __reduce_min_sync(0xffffffffu, head);
    if (block == kNone) {
      return steps;
    }
    const uint32_t tokens = __ballot_sync(0xffffffffu, head == block);
    if (lane == 0) {
      to[steps] = pack_step(block, tokens);
    }
    ++steps;
    if (head == block) {
      head = take();
    }
  }
}

// One token's softmax and sums.
template <int kDimV>
struct TokenSums {
  float maximum[2];
  float sum[2];
  float out[kDimV / 8][4];

  __device__ void reset() {
    maximum[0] = maximum[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.f;
    clear(out);
  }

  // Turns scores into exp(scale (score - maximum)). The maximum follows the scores only when one is more than kSlack
  // (of an exponent to base 2) above it, which is rare after the first blocks: most steps leave `out` as it is.
  template <int kTiles>
  __device__ void step(float (&scores)[kTiles][4], float scale_log2) {
    constexpr float kSlack = 8.f;
    float highest[2];
    bool higher = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
      for (int i = 1; i < kTiles; ++i) {
        highest[half] = fmaxf(highest[half], fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
      }
      highest[half] = fmaxf(row_max(highest[half]), maximum[half]);
      higher |= (highest[half] - maximum[half]) * scale_log2 > kSlack;
    }
    if (__any_sync(0xffffffffu, higher)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = highest[half] == kMinusInfinity ? 0.f : highest[half] * scale_log2;
        const float factor = exp2_approx(fmaf(maximum[half], scale_log2, -offset));
        maximum[half] = highest[half];
        sum[half] *= factor;
#pragma unroll
        for (int i = 0; i < kDimV / 8; ++i) {
          out[i][2 * half] *= factor;
          out[i][2 * half + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float offset = maximum[half] == kMinusInfinity ? 0.f : maximum[half] * scale_log2;
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[i][2 * half + j];
          score = exp2_approx(fmaf(score, scale_log2, -offset));
          total += score;
        }
      }
      sum[half] += total;
    }
  }
};

// Rows of a right operand from `count` on become zeros: their weights are 0, but what lies there need not be finite.
__device__ inline void clear_rows(uint32_t (&b)[4], int row, int count, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int first = row + 8 * i + 2 * (lane % 4);
    const uint32_t keep = first + 1 < count ? 0xffffffffu : first < count ? 0x0000ffffu : 0u;
    b[i] &= keep;
    b[i + 2] &= keep;
  }
}

// One block for the warp's tokens [kFirst, kFirst + kCount); only its first `keys` keys when kMasked.
template <typename Shape, int kFirst, int kCount, bool kMasked>
__device__ inline void union_step(TokenSums<Shape::kDimV> (&sums)[Shape::kWarpTokens], typename Shape::Element* q_data,
                                  const typename Shape::KTile& k_tile, const typename Shape::VTile& v_tile,
                                  int32_t keys, float scale_log2, bool negative, int lane) {
  using Element = typename Shape::Element;
  using QTile = typename Shape::QTile;
  constexpr int kPart = Shape::kPartKeys;
#pragma unroll 1
  for (int part = 0; part < (kMasked ? min(keys, Shape::kKeys) : Shape::kKeys); part += kPart) {
    const typename Shape::KTile k_part{k_tile.begin + part * 128};
    const typename Shape::VTile v_part{v_tile.begin + part * 128};
    float scores[kCount][kPart / 8][4];
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      clear(scores[t]);
    }
#pragma unroll
    for (int column = 0; column < Shape::kDimK; column += 16) {
      uint32_t a[kCount][4];
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        QTile{q_data + (kFirst + t) * QTile::kSize}.load_left(a[t], 0, column, lane);
      }
#pragma unroll
      for (int i = 0; i < kPart / 16; ++i) {
        uint32_t b[4];
        k_part.load_right_transposed(b, 16 * i, column, lane);
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
          multiply_add<Element>(scores[t][2 * i], a[t], b[0], b[1]);
          multiply_add<Element>(scores[t][2 * i + 1], a[t], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      if (negative) {
        negate(scores[t]);
      }
      if constexpr (kMasked) {
        keep_range(scores[t], 0, 0, keys - part, lane);
        keep_range(scores[t], 1, 0, keys - part, lane);
      }
      sums[kFirst + t].step(scores[t], scale_log2);
    }
#pragma unroll
    for (int i = 0; i < kPart / 16; ++i) {
      if (kMasked && part + 16 * i >= keys) {
        break;
      }
      uint32_t a[kCount][4];
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        as_left<Element>(a[t], scores[t], i);
      }
#pragma unroll
      for (int column = 0; column < Shape::kDimV; column += 16) {
        uint32_t b[4];
        v_part.load_right(b, 16 * i, column, lane);
        if constexpr (kMasked) {
          clear_rows(b, 16 * i, keys - part, lane);
        }
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
          multiply_add<Element>(sums[kFirst + t].out[column / 8], a[t], b[0], b[1]);
          multiply_add<Element>(sums[kFirst + t].out[column / 8 + 1], a[t], b[2], b[3]);
        }
      }
    }
  }
}

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
