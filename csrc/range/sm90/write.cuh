// How Hopper's attention over a range writes its output: consumers round it into shared memory, and a warp of its own
// copies it out. With a gated sum, the rows of the two other branches have been copied to where the sum and the output
// then lie.
#pragma once

#include "common/gates.cuh"
#include "range/sm90/forward_tiles.cuh"

namespace nsa {

// The gates of a tile's rows to shared memory, by one warp; 0 where there is no row.
template <typename Shape>
__device__ inline void load_tile_gates(const RangeForwardSm90Params& params, const RangeTile& tile,
                                       float (&to)[Shape::kConsumers * 64][3]) {
#pragma unroll 2
  for (int i = fresh_thread() % 32; i < Shape::kConsumers * 64; i += 32) {
    const int32_t row = tile.first_row + i / 64 * params.consumer_rows + i % 64;
    float gates[3] = {0.f, 0.f, 0.f};
    if (row <= tile.last_row) {
      const Row at = row_at(params.range.sequences, tile.head_kv, row);
      load_gates(gates, params.range.sum.gates, tile.batch, int64_t{tile.first_token} + at.query, at.head);
    }
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      to[i][b] = gates[b];
    }
  }
}

// A warp's 16 rows of the output, times `factors`, to `to`.
template <typename Element, typename OutTile, int kTiles>
__device__ inline void stage_rows(OutTile to, const float (&out)[kTiles][4], const float (&factors)[2], int first_row,
                                  int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
    uint32_t a[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float (&c)[4] = out[i + j / 2];
      a[j] = pack<Element>(c[2 * (j % 2)] * factors[j % 2], c[2 * (j % 2) + 1] * factors[j % 2]);
    }
    to.store_left(a, first_row, 8 * i, lane);
  }
}

// The same with gates: the sum to `to`, where the compressed branch's rows lie, and the output to where the selected
// branch's do.
template <typename Element, typename OutTile, int kTiles>
__device__ inline void stage_gated_rows(OutTile to, OutTile selected, const float (&out)[kTiles][4],
                                        const float (&factors)[2], const float (&gates)[2][3], int first_row,
                                        int lane) {
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
    uint32_t x[4];
    uint32_t y[4];
    uint32_t a[4];
    to.load_left(x, first_row, 8 * i, lane);
    selected.load_left(y, first_row, 8 * i, lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float (&c)[4] = out[i + j / 2];
      a[j] = pack<Element>(c[2 * (j % 2)] * factors[j % 2], c[2 * (j % 2) + 1] * factors[j % 2]);
      x[j] = gated_pair<Element>(gates[j % 2], x[j], y[j], a[j]);
    }
    to.store_left(x, first_row, 8 * i, lane);
    selected.store_left(a, first_row, 8 * i, lane);
  }
}

// A tile's rows, staged as above, by one warp: by the copy engine unless another sequence lies behind them.
template <typename Shape>
__device__ inline void copy_rows_out(const RangeForwardSm90Params& params, const RangeTile& tile,
                                     typename Shape::Element* staged, int consumer_size, const CUtensorMap& map,
                                     void* to) {
  using OutTile = typename Shape::OutTile;
  using Element = typename Shape::Element;
  const RangeForwardParams& range = params.range;
  const SequenceLayout& s = range.sequences;
  const bool whole = !s.packed() || tile.last_row + 1 - tile.first_row == params.tile_rows;
  if (!whole) {
    constexpr int kChunks = Shape::kDimV / 8;
    const int index = fresh_thread() % kChunks;
#pragma unroll 1
    for (int row = fresh_thread() % 32 / kChunks; row <= tile.last_row - tile.first_row; row += 32 / kChunks) {
      const int consumer = row / params.consumer_rows;
      const Row at = row_at(s, tile.head_kv, tile.first_row + row);
      TensorView view = range.out;
      view.data = to;
      if (8 * index < view.width) {
        const OutTile from{shared_address(staged + consumer * consumer_size)};
        *reinterpret_cast<uint4*>(view.row<Element>(tile.batch, int64_t{tile.first_token} + at.query, at.head) +
                                  8 * index) = load_chunk(from.chunk(row - consumer * params.consumer_rows, index));
      }
    }
    __syncwarp();
  } else if (fresh_thread() % 32 == 0) {
#pragma unroll 1
    for (int i = 0; i < Shape::kConsumers; ++i) {
      const int32_t token = tile.first_token + row_at(s, 0, tile.first_row + params.consumer_rows * i).query;
#pragma unroll
      for (int panel = 0; panel < OutTile::kPanels; ++panel) {
        store_box(&map, staged + i * consumer_size + panel * OutTile::kPanelSize, 64 * panel, tile.head_kv * s.group,
                  token, tile.batch);
      }
    }
  }
}

// By a warp: copies out what consumers have staged, tile by tile.
template <typename Shape>
__device__ inline void store_range(const RangeForwardSm90Params& params, typename Shape::Shared& shared) {
  constexpr int kTiles = Shape::kTiles;
  constexpr int kQStages = Shape::kQStages;
  const GatedSum& sum = params.range.sum;
  const bool sums = Shape::kSums && sum.out != nullptr;
  uint32_t seen = 0;
#pragma unroll 1
  for (uint32_t tiles = 0;; ++tiles) {
    wait(&shared.tile_full[RingPlace<kTiles>::of(tiles).stage], RingPlace<kTiles>::of(tiles).parity);
    const RangeTile& tile = shared.tiles[RingPlace<kTiles>::of(tiles).stage];
    if (tile.first_row > tile.last_row) {
      break;
    }
    if (tile.begin < tile.end) {
      if constexpr (Shape::kSums) {
        if (sums) {
          load_tile_gates<Shape>(params, tile, shared.gates);
          arrive(&shared.others_full);
        }
      }
      wait(&shared.out_full, RingPlace<1>::of(seen).parity);
      if (sums) {
        copy_rows_out<Shape>(params, tile, shared.out[0], Shape::OutTile::kSize, params.sum, sum.out);
      }
      if (params.range.out.data != nullptr) {
        typename Shape::Element* const staged = sums ? shared.q[RingPlace<kQStages>::of(seen).stage][0] : shared.out[0];
        copy_rows_out<Shape>(params, tile, staged, sums ? Shape::QTile::kSize : Shape::OutTile::kSize, params.out,
                             params.range.out.data);
      }
      ++seen;
      if (fresh_thread() % 32 == 0) {
        commit_stores();
        wait_until_stores_read();
      }
      arrive(&shared.out_empty);
    }
    arrive(&shared.tile_empty[RingPlace<kTiles>::of(tiles).stage]);
  }
  wait_stores();
}

// A consumer's rows of a tile that sees no key.
template <typename Element>
__device__ inline void write_unseen_rows(const RangeForwardSm90Params& params, const RangeTile& tile, int consumer) {
  const RangeForwardParams& range = params.range;
  const GatedSum& sum = range.sum;
  const int32_t chunks = range.out.width / 8;
  const int32_t first_row = tile.first_row + consumer * params.consumer_rows;
  const int32_t rows = min(params.consumer_rows, tile.last_row + 1 - first_row);
#pragma unroll 1
  for (int32_t i = fresh_thread() % kWarpgroup; i < rows * chunks; i += kWarpgroup) {
    const int32_t row = i / chunks;
    const int32_t column = 8 * (i - row * chunks);
    const Row at = row_at(range.sequences, tile.head_kv, first_row + row);
    const int64_t token = int64_t{tile.first_token} + at.query;
    if (column == 0) {
      range.lse.at(tile.batch, at.head, token) = kMinusInfinity;
    }
    const auto chunk = [&](const void* data) {
      TensorView view = range.out;
      view.data = const_cast<void*>(data);
      return reinterpret_cast<uint4*>(view.row<Element>(tile.batch, token, at.head) + column);
    };
    if (range.out.data != nullptr) {
      *chunk(range.out.data) = uint4{};
    }
    if (sum.out != nullptr) {
      float gates[3];
      load_gates(gates, sum.gates, tile.batch, token, at.head);
      *chunk(sum.out) = gated_chunk<Element>(gates, *chunk(sum.others[0]), *chunk(sum.others[1]), uint4{});
    }
  }
}

}  // namespace nsa
