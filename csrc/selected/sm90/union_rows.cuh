// Rows of a union's tile: what a warpgroup of Hopper's selected attention does with its own, besides the walk.
#pragma once

#include "common/sm90/write_row.cuh"
#include "selected/sm90/row_products.cuh"
#include "selected/sm90/union.cuh"

namespace nsa {

// This thread's lane, read anew: what is computed from it is not kept in registers meanwhile.
__device__ inline int fresh_lane() { return fresh_thread() & 31; }

// The panels of a gradient of q that one product adds to: 64 or 128 columns.
template <int kDimK>
struct GradientParts {
  static constexpr int kColumns = kDimK == 128 ? 128 : 64;
  static constexpr int kCount = kDimK / kColumns;
};
template <int kDimK>
using GradientSums = float[GradientParts<kDimK>::kCount][GradientParts<kDimK>::kColumns / 8][4];

// Of a group's rows: which token, counted within the group, and which head.
struct UnionRow {
  int token;
  int head;
};
template <typename Shape>
__device__ inline UnionRow union_row(const UnionParams& u, int warp, int half, int lane) {
  const int row = 16 * warp + 8 * half + lane / 4;
  if constexpr (Shape::kHeadSlots == 4) {
    return UnionRow{row / 4, row % 4};
  }
  return head_slots_of<Shape>(u) == 16 ? UnionRow{row / 16, row % 16} : UnionRow{row / 8, row % 8};
}
// All bits, if the token of one of the lane's rows is among those.
template <typename Shape>
__device__ inline uint32_t chosen_row(const UnionParams& u, uint32_t tokens, int warp, int half) {
  int token = head_slots_of<Shape>(u) == 16 ? warp : 2 * warp + half;
  if constexpr (Shape::kHeadSlots == 4) {
    token = 4 * warp + 2 * half + fresh_lane() / 16;
  }
  return 0u - (tokens >> token & 1);
}
// A warp's tokens, among those of its group.
__device__ inline uint32_t tokens_of_warp(int group_tokens, int warp) {
  return group_tokens == 4 ? 1u << warp : group_tokens == 8 ? 3u << 2 * warp : 15u << 4 * warp;
}

// A number that depends on all operands that mma.sync has multiplied into these sums, 16 columns at a time. Where it is
// there, they have been loaded. (The register loaded last in the source tells nothing: ptxas changes the order of
// loads.)
template <int kTiles>
__device__ inline uint32_t mark_of(const float (&sums)[kTiles][4]) {
  uint32_t mark = 0;
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
    mark ^= __float_as_uint(sums[i][0]);
  }
  return mark;
}

// A warp's 16 rows of a tile, as left operands. Returns a number that depends on all of them.
template <typename Tile, int kSteps>
__device__ inline uint32_t load_rows(uint32_t (&rows)[kSteps][4], const Tile& tile, int warp) {
  uint32_t mark = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    tile.load_left(rows[i], 16 * warp, 16 * i, fresh_lane());
    mark ^= rows[i][0];
  }
  return mark;
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

// to = rows b^T for a tile b, or for its rows from `first` on; rows are in registers.
template <int kTiles, int kSteps, typename Tile>
__device__ inline void multiply_rows_alone(float (&to)[kTiles][4], const uint32_t (&rows)[kSteps][4],
                                           const Tile& b_tile, int first) {
  clear(to);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      uint32_t b[4];
      b_tile.load_right_transposed(b, first + 16 * i, 16 * step, fresh_lane());
      multiply_add<typename Tile::Element>(to[2 * i], rows[step], b[0], b[1]);
      multiply_add<typename Tile::Element>(to[2 * i + 1], rows[step], b[2], b[3]);
    }
  }
}
// The same for a warpgroup's rows and a whole tile: starts it.
template <int kSteps, typename Tile>
__device__ inline void start_rows(float (&to)[8][4], const uint32_t (&rows)[kSteps][4], const Tile& b_tile) {
  using Element = typename Tile::Element;
  const uint64_t b = tile_descriptor(b_tile.begin, 0);
  fence_products();
  multiply_rows_first<Element>(to, rows[0], b);
#pragma unroll
  for (int i = 1; i < kSteps; ++i) {
    multiply_rows<Element>(to, rows[i], advance(b, 2 * (i / 4 * Tile::kPanelSize + i % 4 * 16)));
  }
  commit_products();
}

// sums += weights K for a warp's rows and 16 keys, from `first` on, by mma.sync.
template <int kDimK, typename KTile>
__device__ inline void add_products_alone(GradientSums<kDimK>& sums, const uint32_t (&weights)[4], const KTile& k_tile,
                                          int first, int lane) {
  using Element = typename KTile::Element;
  constexpr int kColumns = GradientParts<kDimK>::kColumns;
#pragma unroll
  for (int column = 0; column < kDimK; column += 16) {
    uint32_t b[4];
    k_tile.load_right(b, first, column, lane);
    auto& part = sums[column / kColumns];
    multiply_add<Element>(part[column % kColumns / 8], weights, b[0], b[1]);
    multiply_add<Element>(part[column % kColumns / 8 + 1], weights, b[2], b[3]);
  }
}
// The same for a warpgroup's rows and a whole block, by wgmma. Waits for the end.
template <int kDimK, typename KTile>
__device__ inline void add_products_together(GradientSums<kDimK>& sums, const uint32_t (&weights)[4][4],
                                             const KTile& k_tile) {
  using Parts = GradientParts<kDimK>;
  const uint64_t k = tile_descriptor(k_tile.begin, KTile::kPanelSize * 2);
#pragma unroll
  for (int part = 0; part < Parts::kCount; ++part) {
    hold(sums[part]);
  }
  fence_products();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int part = 0; part < Parts::kCount; ++part) {
      multiply_async<typename KTile::Element>(
          sums[part], weights[i], advance(k, 2 * (part * Parts::kColumns / 64 * KTile::kPanelSize + 64 * 16 * i)),
          true);
    }
  }
  commit_products();
  wait_products<0>();
#pragma unroll
  for (int part = 0; part < Parts::kCount; ++part) {
    hold(sums[part]);
  }
}

// Writes a warp's rows of the gradient of q, or adds them to what is there. kGated: the gate is not in the sums yet.
template <typename Shape, bool kGated>
__device__ inline void write_query_gradients(const SelectedBackwardParams& p, const UnionParams& u,
                                             const UnionTile& tile, const GradientSums<Shape::kDimK>& sums, int group,
                                             int warp) {
  using Parts = GradientParts<Shape::kDimK>;
  const int lane = fresh_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const UnionRow row = union_row<Shape>(u, warp, half, lane);
    const int32_t query = tile.first_query + group * group_tokens_of<Shape>(u) + row.token;
    typename Shape::Element* to = nullptr;
    float factor = p.scale;
    if (query < tile.place.q_length && row.head < tile.heads) {
      const int64_t token = tile.place.q_begin + query;
      to = p.grad_q.row<typename Shape::Element>(tile.place.batch, token, tile.first_head + row.head);
      if (kGated && p.gate.data != nullptr) {
        factor *= p.gate.at(tile.place.batch, tile.first_head + row.head, token);
      }
    }
#pragma unroll
    for (int part = 0; part < Parts::kCount; ++part) {
      const int first = part * Parts::kColumns;
      write_row(to == nullptr ? nullptr : to + first, p.grad_q.width - first, sums[part], half, factor, p.add_to_grad_q,
                lane);
    }
  }
}

// A warp's rows of Q: in registers or, where there are too few of those, its group's in shared memory.
template <typename Shape>
struct UnionQueries {
  using Element = typename Shape::Element;
  using KTile = typename Shape::KTile;

  uint32_t rows[Shape::kQInRegisters ? Shape::kDimK / 16 : 1][4];
  KTile own;
  int group;
  int warp;

  __device__ UnionQueries(const UnionShared<Shape>& shared, int group_, int warp_)
      : own{shared_address(shared.q) + group_ * Shape::kGroupBytes}, group(group_), warp(warp_) {}

  // Returns a number that is there when all have been loaded.
  __device__ uint32_t take(const KTile& from) {
    if constexpr (Shape::kQInRegisters) {
      return load_rows(rows, from, warp);
    } else {
      const uint32_t first = 16 * warp * 128 + 16 * fresh_lane();
#pragma unroll
      for (int panel = 0; panel < KTile::kPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t at = panel * KTile::kPanelSize * 2 + first + 512 * i;
          store_shared(own.begin + at, load_shared(from.begin + at));
        }
      }
      fence_shared_writes();
      sync_threads(1 + group, kWarpgroup);
      return 0;  // all are stored by now
    }
  }
  // Q K^T of this warp's rows and keys from `first` on.
  template <int kTiles>
  __device__ void multiply_alone(float (&scores)[kTiles][4], const KTile& k_tile, int first) const {
    if constexpr (Shape::kQInRegisters) {
      multiply_rows_alone(scores, rows, k_tile, first);
    } else {
      clear(scores);
#pragma unroll
      for (int column = 0; column < Shape::kDimK; column += 16) {
        uint32_t a[4];
        own.load_left(a, 16 * warp, column, fresh_lane());
#pragma unroll
        for (int i = 0; i < kTiles / 2; ++i) {
          uint32_t b[4];
          k_tile.load_right_transposed(b, first + 16 * i, column, fresh_lane());
          multiply_add<Element>(scores[2 * i], a, b[0], b[1]);
          multiply_add<Element>(scores[2 * i + 1], a, b[2], b[3]);
        }
      }
    }
  }
  // Starts Q K^T of the group's rows.
  __device__ void start(float (&scores)[8][4], const KTile& k_tile) const {
    if constexpr (Shape::kQInRegisters) {
      start_rows(scores, rows, k_tile);
    } else {
      const uint64_t q = tile_descriptor(own.begin, 0);
      const uint64_t k = tile_descriptor(k_tile.begin, 0);
      fence_products();
#pragma unroll
      for (int column = 0; column < Shape::kDimK; column += 16) {
        const int bytes = 2 * (column / 64 * KTile::kPanelSize + column % 64);
        multiply_async<Element>(scores, advance(q, bytes), advance(k, bytes), column != 0);
      }
      commit_products();
    }
  }
};

// Rows of a tile from `count` on become zeros: what lies there need not be finite. By the threads of a warpgroup;
// `barrier` is its.
template <typename Tile>
__device__ inline void clear_rows(const Tile& tile, int count, int barrier, int thread) {
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

}  // namespace nsa
