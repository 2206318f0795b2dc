// select_blocks on tensor cores. Transposed scores, S^T = K Q^T, put a group's heads along the accumulator's columns, so that
// their sum is taken within a lane and over four lanes. A block of threads walks the compressed keys that its last query sees;
// every warp has 32 columns: 4, 2 or 1 queries of up to 8, 16 or 32 heads. Nothing of the size of all scores is kept: a
// warp ranks the blocks that a tile of keys completes, and forgets the tile.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sequences.cuh"
#include "selection/best_blocks.cuh"
#include "selection/params.h"

namespace nsa {

constexpr int kSelectColumns = 32;       // of a warp
constexpr int kMostOverlap = 32;         // l / d, at most

// kTilesPerQuery: 8-column tiles of one query, which hold its heads: 1, 2 or 4.
template <typename Element_, int kDim_, int kKeys_, int kTilesPerQuery_>
struct SelectShape {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kTilesPerQuery = kTilesPerQuery_;
  static constexpr int kQueries = 4 / kTilesPerQuery;  // of a warp
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStripSize = kKeys + kMostOverlap;
  static constexpr int kSharedBytes = sizeof(Element) * (kWarps * kSelectColumns + 2 * kKeys) * kDim +
                                      sizeof(float) * kWarps * kQueries * kStripSize;
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kDim <= 128 && Shape::kTilesPerQuery > 1 ? 3 : 2)
    select_blocks(const __grid_constant__ SelectBlocksParams params) {
  using Element = typename Shape::Element;
  constexpr int kKeys = Shape::kKeys;
  using KTile = SharedTile<Element, kKeys, Shape::kDim>;
  using QTile = SharedTile<Element, kSelectColumns, Shape::kDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  Element* const k_tiles = reinterpret_cast<Element*>(shared);
  Element* const q_tiles = k_tiles + 2 * KTile::kSize;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const QTile q_tile{q_tiles + warp * QTile::kSize};
  // Of each query, head-summed probabilities: `carry` keys of the tile before, then this tile's.
  float* const strips =
      reinterpret_cast<float*>(q_tiles + Shape::kWarps * QTile::kSize) + warp * Shape::kQueries * Shape::kStripSize;

  const Sequences& s = params.sequences;
  constexpr int kQueriesPerBlock = Shape::kQueries * Shape::kWarps;
  // The latest queries see the most keys: they go first.
  const int64_t slots = gridDim.x / static_cast<unsigned>(s.heads_kv);
  const int32_t head_kv = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(s.heads_kv));
  const int64_t slot = slots - 1 - blockIdx.x / static_cast<unsigned>(s.heads_kv);
  const Tile tile = find_tile(s, s.cumulative_q, 1, s.length_q, kQueriesPerBlock, slot);
  const SequencePlace place = place_of(s, tile.sequence);
  const int32_t first_query = tile.index * kQueriesPerBlock;
  if (first_query >= place.q_length) {
    return;
  }
  const int32_t last_query = min(first_query + kQueriesPerBlock, place.q_length) - 1;
  const int32_t own_first = first_query + warp * Shape::kQueries;
  const int pieces_per_compressed = params.block_size / params.block_stride;
  const int pieces_per_selected = params.select_size / params.block_stride;
  const int carry = pieces_per_compressed - 1;
  const int blocks_per_tile = kKeys / pieces_per_selected;
  const int step = blocks_per_tile * pieces_per_selected;
  const auto visible = [&](int32_t position) {
    return static_cast<int32_t>(
        num_compressed_blocks(int64_t{position} + 1, params.block_size, params.block_stride));
  };
  const int32_t last_position = place.offset + last_query;
  const int32_t all_keys = visible(last_position);
  const int32_t last_block = last_position < 0 ? -1 : last_position / params.select_size;

  const auto copy_keys = [&](int32_t first_key) {
    const KTile to{k_tiles + first_key / step % 2 * KTile::kSize};
    to.template copy_consecutive<Shape::kThreads>(
        params.k.row<Element>(place.batch, place.cmp_begin + first_key, head_kv), params.k.token_stride,
        all_keys - first_key, params.k.width, thread);
  };
  q_tile.copy_rows(params.q.width, params.q.data, lane, 32, [&](int column) -> const Element* {
    const int32_t query = own_first + column / (8 * Shape::kTilesPerQuery);
    const int32_t head = column % (8 * Shape::kTilesPerQuery);
    return query <= last_query && head < s.group
               ? params.q.row<Element>(place.batch, place.q_begin + query, head_kv * s.group + head)
               : nullptr;
  });
  if (all_keys > 0) {
    copy_keys(0);
  }
  commit_copies();

  // Of the lane's columns: lse in powers of 2, +inf where there is no query or it sees nothing, so that probabilities are 0.
  float lse[4][2];
  int32_t seen[4];  // keys that the tile's query sees
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t query = own_first + i / Shape::kTilesPerQuery;
    seen[i] = query <= last_query ? visible(place.offset + query) : 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t head = i % Shape::kTilesPerQuery * 8 + 2 * (lane % 4) + j;
      float value = -kMinusInfinity;
      if (query <= last_query && head < s.group) {
        const float given = params.lse.at(place.batch, head_kv * s.group + head, place.q_begin + query);
        value = given == kMinusInfinity ? value : given * kLog2E;
      }
      lse[i][j] = value;
    }
  }
  const float scale_log2 = params.scale * kLog2E;
  Choice choices[Shape::kQueries];
  BestBlocks best[Shape::kQueries];
#pragma unroll
  for (int t = 0; t < Shape::kQueries; ++t) {
    if (own_first + t <= last_query) {
      choices[t] = Choice(params.forced, place.offset + own_first + t, params.select_size, params.num_selected);
    }
    if (lane < carry) {
      strips[t * Shape::kStripSize + lane] = 0.f;
    }
  }

  for (int32_t first_key = 0, first_block = 0; first_block <= last_block;
       first_key += step, first_block += blocks_per_tile) {
    wait_copies<0>();
    __syncthreads();
    if (first_key + step < all_keys) {
      copy_keys(first_key + step);
    }
    commit_copies();
    if (first_key < all_keys) {
      const KTile k_tile{k_tiles + first_key / step % 2 * KTile::kSize};
      float scores[kKeys / 16][4][4];
      multiply_transposed(scores, k_tile, 0, q_tile, lane);
#pragma unroll
      for (int r = 0; r < kKeys / 16; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = 16 * r + 8 * half + lane / 4;
          float sums[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[i] = 0.f;
            if (first_key + key < seen[i]) {
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                sums[i] += exp2_approx(fmaf(scores[r][i][2 * half + j], scale_log2, -lse[i][j]));
              }
            }
          }
          if constexpr (Shape::kTilesPerQuery == 2) {
            sums[0] += sums[1];
            sums[1] = sums[2] + sums[3];
          } else if constexpr (Shape::kTilesPerQuery == 4) {
            sums[0] += sums[1] + sums[2] + sums[3];
          }
#pragma unroll
          for (int t = 0; t < Shape::kQueries; ++t) {
            const float sum = row_sum(sums[t]);
            if (lane % 4 == 0 && key < step) {
              strips[t * Shape::kStripSize + carry + key] = sum;
            }
          }
        }
      }
    } else {
      for (int i = lane; i < Shape::kQueries * step; i += 32) {
        strips[i / step * Shape::kStripSize + carry + i % step] = 0.f;
      }
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < Shape::kQueries; ++t) {
      if (choices[t].free > 0 && first_block <= choices[t].own) {
        const float* const strip = strips + t * Shape::kStripSize;
        for (int i = lane; i - lane < blocks_per_tile; i += 32) {
          const int32_t block = first_block + i;
          float importance = kNoBlock;
          if (i < blocks_per_tile && choices[t].candidate(block)) {
            importance = block_importance(strip + i * pieces_per_selected, pieces_per_compressed, pieces_per_selected);
          }
          best[t].take(importance, block, choices[t].free, lane);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < Shape::kQueries; ++t) {
      if (lane < carry) {
        strips[t * Shape::kStripSize + lane] = strips[t * Shape::kStripSize + step + lane];
      }
    }
    __syncwarp();
  }

  wait_copies<0>();
  __syncwarp();
#pragma unroll
  for (int t = 0; t < Shape::kQueries; ++t) {
    if (own_first + t <= last_query) {
      const int64_t token = place.batch * s.length_q + place.q_begin + own_first + t;
      write_list(params.block_indices + (token * s.heads_kv + head_kv) * params.num_selected, params.num_selected,
                 choices[t], best[t], reinterpret_cast<int32_t*>(strips), lane);
    }
  }
}

}  // namespace nsa
