// A block of threads that attends to keys of one KV head as they stream from pages into shared memory.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "common/tile_dims.h"
#include "decode/ranges.cuh"
#include "decode/tiles.h"

namespace nsa {

// kRowTiles: tiles of 16 rows. Warps are laid out as row tiles by slices of a chunk's keys.
template <typename Element_, int kDimK_, int kDimV_, int kRowTiles_>
struct DecodeShape : TileDimsOf<Element_, kDimK_, kDimV_> {
  using Element = Element_;
  using TileDimsOf<Element_, kDimK_, kDimV_>::kDimK;
  using TileDimsOf<Element_, kDimK_, kDimV_>::kDimV;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kStages = decode_sm80::kStages;
  static constexpr int kKeys = decode_sm80::chunk_keys({kDimK, kDimV});
  static constexpr int kSlices = decode_sm80::slices(kRowTiles, kKeys);
  static constexpr int kSliceKeys = kKeys / kSlices;
  static constexpr int kWarps = kRowTiles * kSlices;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowTiles;
  using QTile = SharedTile<Element, kRows, kDimK>;
  using KTile = SharedTile<Element, kKeys, kDimK>;
  using VTile = SharedTile<Element, kKeys, kDimV>;
  static constexpr int kStageSize = KTile::kSize + VTile::kSize;
  static constexpr int kRingBytes = kStages * kStageSize * static_cast<int>(sizeof(Element));
  static constexpr int kQueryBytes = QTile::kSize * static_cast<int>(sizeof(Element));
  static_assert(kSlices * kRows * kDimV * 4 <= kRingBytes);
};

template <typename Shape>
struct KeyStream {
  using Element = typename Shape::Element;
  Element* ring;
  const RowOffsets* offsets;  // of every key, a multiple of kKeys, in shared memory
  const Element* k;           // the pools, at this head
  const Element* v;
  int32_t k_width;
  int32_t v_width;

  __device__ typename Shape::KTile k_tile(int stage) const { return {ring + stage * Shape::kStageSize}; }
  __device__ typename Shape::VTile v_tile(int stage) const {
    return {ring + stage * Shape::kStageSize + Shape::KTile::kSize};
  }

  __device__ void copy(int32_t chunk, int stage) const {
    const RowOffsets* const of_chunk = offsets + chunk * Shape::kKeys;
    copy_tile(k_tile(stage), k, k_width, [&](int row) { return of_chunk[row].k; });
    copy_tile(v_tile(stage), v, v_width, [&](int row) { return of_chunk[row].v; });
  }

 private:
  template <typename Tile, typename Offset>
  __device__ void copy_tile(const Tile& tile, const Element* base, int32_t width, const Offset& offset_of) const {
    if constexpr (Shape::kThreads % Tile::kChunks == 0) {
      constexpr int kStep = Shape::kThreads / Tile::kChunks;
      const int index = static_cast<int>(threadIdx.x) % Tile::kChunks;
      const bool inside = index * kChunk < width;
      const Element* const from = base + (inside ? index * kChunk : 0);
#pragma unroll
      for (int r = 0; r < Tile::kRows; r += kStep) {
        const int row = r + static_cast<int>(threadIdx.x) / Tile::kChunks;
        const int64_t offset = offset_of(row);
        copy_async(tile.chunk(row, index), from + (offset < 0 ? 0 : offset), inside && offset >= 0);
      }
    } else {
#pragma unroll 2
      for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kChunks; i += Shape::kThreads) {
        const int row = i / Tile::kChunks;
        const int index = i % Tile::kChunks;
        const int64_t offset = offset_of(row);
        const bool valid = offset >= 0 && index * kChunk < width;
        copy_async(tile.chunk(row, index), base + (valid ? offset + index * kChunk : 0), valid);
      }
    }
  }
};

// What a warp has summed up: its row tile's rows, over its slice of the keys.
template <typename Shape>
struct DecodeSums {
  RunningSoftmax<1> softmax;
  float out[1][Shape::kDimV / 8][4];
};

// Starts to copy the queries of rows [first_row, ...): those beyond `rows` become zeros.
template <typename Shape>
__device__ inline void copy_queries(const typename Shape::QTile& tile, const DecodeParams& params,
                                    const DecodeSequence& sequence, int32_t head_kv, int32_t first_row, int32_t rows) {
  using Element = typename Shape::Element;
  tile.copy_rows(params.q.width, params.q.data, static_cast<int>(threadIdx.x), Shape::kThreads,
                 [&](int i) -> const Element* {
                   const int32_t row = first_row + i;
                   if (row >= rows) {
                     return nullptr;
                   }
                   const int32_t query = static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
                   return params.q.row<Element>(sequence.batch, sequence.first + query,
                                                head_kv * params.group + row - query * params.group);
                 });
}

template <typename Shape>
__device__ inline void load_queries(uint32_t (&q)[Shape::kDimK / 16][4], const typename Shape::QTile& tile) {
#pragma unroll
  for (int i = 0; i < Shape::kDimK / 16; ++i) {
    tile.load_left(q[i], 16 * (this_warp() / Shape::kSlices), 16 * i, this_lane());
  }
}

// sums += weights (16 x kSliceKeys) times rows [first, first + kSliceKeys) of a tile of values.
template <typename Shape, int kTiles>
__device__ inline void accumulate_slice(float (&sums)[1][Shape::kDimV / 8][4], const float (&weights)[1][kTiles][4],
                                        const typename Shape::VTile& values, int first) {
#pragma unroll
  for (int i = 0; i < kTiles / 2; ++i) {
    uint32_t a[4];
    as_left<typename Shape::Element>(a, weights[0], i);
#pragma unroll
    for (int column = 0; column < Shape::kDimV; column += 16) {
      uint32_t b[4];
      values.load_right(b, first + 16 * i, column, this_lane());
      multiply_add<typename Shape::Element>(sums[0][column / 8], a, b[0], b[1]);
      multiply_add<typename Shape::Element>(sums[0][column / 8 + 1], a, b[2], b[3]);
    }
  }
}

// The scores of a chunk's slice, masked and scaled; kept where `kept` (row, pitch) is not null.
template <typename Shape, int kTiles>
__device__ inline void score_slice(float (&scores)[kTiles][4], const uint32_t (&q)[Shape::kDimK / 16][4],
                                   const typename Shape::KTile& keys, int slice) {
  clear(scores);
#pragma unroll
  for (int i = 0; i < Shape::kDimK / 16; ++i) {
#pragma unroll
    for (int t = 0; t < kTiles / 2; ++t) {
      uint32_t b[4];
      keys.load_right_transposed(b, slice * Shape::kSliceKeys + 16 * t, 16 * i, this_lane());
      multiply_add<typename Shape::Element>(scores[2 * t], q[i], b[0], b[1]);
      multiply_add<typename Shape::Element>(scores[2 * t + 1], q[i], b[2], b[3]);
    }
  }
}

// Attends to `count` keys. Rows see keys [low[half], high[half]). kept: (rows, pitch) in shared memory, for the scores
// in units of log2(e); null: they are not kept.
template <typename Shape>
__device__ inline void attend_stream(DecodeSums<Shape>& sums, const KeyStream<Shape>& stream,
                                     const uint32_t (&q)[Shape::kDimK / 16][4], int32_t count, const int32_t (&low)[2],
                                     const int32_t (&high)[2], float scale_log2, float* kept, int32_t pitch) {
  constexpr int kTiles = Shape::kSliceKeys / 8;
  const int slice = this_warp() % Shape::kSlices;
  const int row_tile = this_warp() / Shape::kSlices;
  const int32_t chunks = (count + Shape::kKeys - 1) / Shape::kKeys;
  int stage = 0;
  int next_stage = 0;
#pragma unroll 1
  for (int32_t chunk = 1 - Shape::kStages; chunk < chunks; ++chunk) {
    if (chunk > 0) {
      __syncthreads();  // the stage that is filled next is read no more
    }
    if (chunk + Shape::kStages - 1 < chunks) {
      stream.copy(chunk + Shape::kStages - 1, next_stage);
    }
    commit_copies();
    next_stage = next_stage + 1 == Shape::kStages ? 0 : next_stage + 1;
    if (chunk < 0) {
      continue;
    }
    wait_copies<Shape::kStages - 1>();
    __syncthreads();
    float scores[1][kTiles][4];
    score_slice<Shape>(scores[0], q, stream.k_tile(stage), slice);
    const int32_t first_key = chunk * Shape::kKeys + slice * Shape::kSliceKeys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int32_t key = first_key + 8 * t + 2 * (this_lane() % 4) + j;
          float& score = scores[0][t][2 * half + j];
          score = key >= low[half] && key < high[half] ? score * scale_log2 : kMinusInfinity;
        }
        if (kept != nullptr) {
          float* const to = kept + (16 * row_tile + this_lane() / 4 + 8 * half) * pitch + first_key + 8 * t;
          *reinterpret_cast<float2*>(to + 2 * (this_lane() % 4)) =
              make_float2(scores[0][t][2 * half], scores[0][t][2 * half + 1]);
        }
      }
    }
    sums.softmax.step(0, scores[0], sums.out[0], 1.f);
    accumulate_slice<Shape>(sums.out, scores, stream.v_tile(stage), slice * Shape::kSliceKeys);
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();
}

template <typename Shape>
struct SliceExchange {
  float highest[Shape::kSlices][Shape::kRows];
  float total[Shape::kSlices][Shape::kRows];
  RowSums joined[Shape::kRows];
};

// The slices' sums, each scaled to its row's highest score, side by side in `buffer`: (slices, rows, kDimV), in which
// chunks of four numbers change places with the row. exchange.joined holds the sums of all slices.
template <typename Shape>
__device__ inline void lay_out_slices(DecodeSums<Shape>& sums, SliceExchange<Shape>& exchange, float* buffer) {
  const int slice = this_warp() % Shape::kSlices;
  const int row_tile = this_warp() / Shape::kSlices;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * row_tile + this_lane() / 4 + 8 * half;
    const float total = row_sum(sums.softmax.sum[0][half]);
    if (this_lane() % 4 == 0) {
      exchange.highest[slice][row] = sums.softmax.maximum[0][half];
      exchange.total[slice][row] = total;
    }
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * row_tile + this_lane() / 4 + 8 * half;
    float highest = kMinusInfinity;
#pragma unroll
    for (int s = 0; s < Shape::kSlices; ++s) {
      highest = fmaxf(highest, exchange.highest[s][row]);
    }
    if (slice == 0 && this_lane() % 4 == 0) {
      float total = 0.f;
#pragma unroll
      for (int s = 0; s < Shape::kSlices; ++s) {
        total += exchange.total[s][row] * rescaling(exchange.highest[s][row], highest, 1.f);
      }
      exchange.joined[row] = {highest, total};
    }
    const float factor = rescaling(sums.softmax.maximum[0][half], highest, 1.f);
    float* const to = buffer + (slice * Shape::kRows + row) * Shape::kDimV;
#pragma unroll
    for (int i = 0; i < Shape::kDimV / 8; ++i) {
      const int chunk = 2 * i + this_lane() % 4 / 2;
      *reinterpret_cast<float2*>(to + ((chunk ^ (row & 7)) << 2) + this_lane() % 2 * 2) =
          make_float2(sums.out[0][i][2 * half] * factor, sums.out[0][i][2 * half + 1] * factor);
    }
  }
  __syncthreads();
}

// Four neighbouring columns of a row, of all slices together.
template <typename Shape>
__device__ inline float4 join_slices(const float* buffer, int row, int chunk) {
  float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int s = 0; s < Shape::kSlices; ++s) {
    const float4 x =
        *reinterpret_cast<const float4*>(buffer + (s * Shape::kRows + row) * Shape::kDimV + ((chunk ^ (row & 7)) << 2));
    total.x += x.x;
    total.y += x.y;
    total.z += x.z;
    total.w += x.w;
  }
  return total;
}

// Rows [0, rows) of a (rows, kDimV) partial sum and their RowSums.
template <typename Shape>
__device__ inline void store_partial(const SliceExchange<Shape>& exchange, const float* buffer, float* out,
                                     RowSums* row_sums, int32_t rows) {
  constexpr int kChunks = Shape::kDimV / 4;
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < rows * kChunks; i += Shape::kThreads) {
    const int row = i / kChunks;
    *reinterpret_cast<float4*>(out + static_cast<int64_t>(i) * 4) = join_slices<Shape>(buffer, row, i % kChunks);
  }
#pragma unroll 1
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < rows; row += Shape::kThreads) {
    row_sums[row] = exchange.joined[row];
  }
}

}  // namespace nsa
