// What the forward and the gradient of q share: a tile of rows (common/rows.cuh), the keys that any of them sees, and
// how both are copied, masked and written.
#pragma once

#include "common/keys.cuh"
#include "common/rows.cuh"
#include "common/scores.cuh"
#include "common/sm80/tile.cuh"
#include "common/softmax.cuh"
#include "common/tile_dims.h"
#include "range/params.h"

namespace nsa {

// kRowTiles: times 16 rows of each warp. Every right operand is used that often, so two are nearly twice as fast as
// one.
template <typename Element, int kDimK, int kDimV, int kWarps_, int kRowTiles_, int kKeys_>
struct RangeRowTileShape : TileDimsOf<Element, kDimK, kDimV> {
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  using QTile = SharedTile<Element, kRows, kDimK>;
  using OutTile = SharedTile<Element, kRows, kDimV>;
  using KTile = SharedTile<Element, kKeys, kDimK>;
  using VTile = SharedTile<Element, kKeys, kDimV>;

  // The first of this warp's rows.
  static __device__ int warp_row() { return this_warp() * (16 * kRowTiles); }
};

// Consecutive rows of one sequence and KV head; `row` counts within the tile.
struct RangeRowTile {
  const SequenceLayout& layout;
  SequencePlace place;
  int32_t head_kv;
  int32_t first_row;
  int32_t last_row;

  // The latest queries see the most keys: they go first.
  template <int kRows>
  static __device__ RangeRowTile of_block(const SequenceLayout& s) {
    const int64_t slots = gridDim.x / static_cast<unsigned>(s.heads_kv);
    const int32_t head_kv = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(s.heads_kv));
    const int64_t slot = slots - 1 - blockIdx.x / static_cast<unsigned>(s.heads_kv);
    const Tile tile = find_tile(s, s.cumulative_q, s.group, s.length_q * s.group, kRows, slot);
    const SequencePlace place = place_of(s, tile.sequence);
    const int32_t first_row = tile.index * kRows;
    return {s, place, head_kv, first_row, min(first_row + kRows, place.q_length * s.group) - 1};
  }
  // Slots may lie past their sequence's end.
  __device__ bool empty() const { return first_row > last_row; }

  __device__ bool contains(int row) const { return first_row + row <= last_row; }
  __device__ Row at(int row) const { return row_at(layout, head_kv, first_row + row); }
  __device__ int32_t position(int row) const { return place.offset + at(row).query; }
  template <typename Element>
  __device__ Element* row_of(const TensorView& tensor, int row) const {
    const Row where = at(row);
    return tensor.row<Element>(place.batch, place.q_begin + where.query, where.head);
  }

  template <int kThreads, typename SharedTile>
  __device__ void copy_rows(const SharedTile& to, const TensorView& from, int thread) const {
    using Element = typename SharedTile::Element;
    to.copy_rows(from.width, from.data, thread, kThreads,
                 [&](int row) -> const Element* { return contains(row) ? row_of<Element>(from, row) : nullptr; });
  }

  // Writes rows [warp_row, warp_row + kWarpRows) of `from`, by one warp.
  template <int kWarpRows, typename SharedTile>
  __device__ void write_rows(const TensorView& to, const SharedTile& from, int warp_row, bool add, int lane) const {
    using Element = typename SharedTile::Element;
    constexpr int kChunks = SharedTile::kChunks;
#pragma unroll 4
    for (int i = lane; i < kWarpRows * kChunks; i += 32) {
      const int row = warp_row + i / kChunks;
      const int index = i % kChunks;
      if (contains(row) && index * kChunk < to.width) {
        uint4* const address = reinterpret_cast<uint4*>(row_of<Element>(to, row) + index * kChunk);
        uint4 value = *reinterpret_cast<const uint4*>(from.chunk(row, index));
        if (add) {
          value = add_chunks<Element>(value, *address);
        }
        *address = value;
      }
    }
  }
};

// The keys that some row of a tile sees.
struct KeysSeen {
  const Visibility& visibility;
  int64_t first;   // where the sequence's keys begin
  int32_t length;  // how many it has
  int32_t begin;
  int32_t end;
  // Keys in [all_begin, all_end) are seen by every row.
  int32_t all_begin;
  int32_t all_end;

  template <typename Params>
  static __device__ KeysSeen by(const RangeRowTile& tile, const Params& params) {
    const Visibility& visibility = params.visibility;
    const KeysPlace keys = keys_of(tile.place, visibility, params.compressed);
    const int32_t first_position = tile.position(0);
    const int32_t last_position = tile.position(tile.last_row - tile.first_row);
    return {visibility,
            keys.begin,
            keys.length,
            visibility.begin(first_position),
            min(visibility.end(last_position), keys.length),
            visibility.begin(last_position),
            min(visibility.end(first_position), keys.length)};
  }

  template <int kThreads, typename SharedTile>
  __device__ void copy_keys(const SharedTile& to, const TensorView& from, const RangeRowTile& tile, int32_t key,
                            int thread) const {
    using Element = typename SharedTile::Element;
    to.template copy_consecutive<kThreads>(from.row<Element>(tile.place.batch, first + key, tile.head_kv),
                                           from.token_stride, end - key, from.width, thread);
  }

  // Whether some row does not see some of these keys.
  template <int kKeys>
  __device__ bool cut(int32_t key) const {
    return key < all_begin || key + kKeys > all_end;
  }
  // Sets scores of keys from `key` on that the lane's two rows, `row` and row + 8, don't see to -inf.
  template <int kTiles>
  __device__ void mask(float (&scores)[kTiles][4], const RangeRowTile& tile, int row, int32_t key, int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t position = tile.position(row + 8 * half);
      const int32_t low = visibility.begin(position) - key;
      const int32_t high = min(visibility.end(position), length) - key;
      keep_range(scores, half, low, high, lane);
    }
  }
};

}  // namespace nsa
