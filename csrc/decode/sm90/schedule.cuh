// Which stages of keys a block of threads takes: of all sequences' stages, in their order, an equal share. So the work
// is even whatever the lengths are, and few splits have partial sums. A block of threads reads the lengths for itself.
//
// With a number of splits given, splits are cut at the same stages in any batch instead, and taken in turn.
#pragma once

#include "decode/ranges.cuh"
#include "decode/tiles.h"

namespace nsa {

// Stages of one tile of a sequence's rows.
struct StageCounts {
  int32_t compressed;
  int32_t window;
  __device__ int32_t both() const { return compressed + window; }
};

__device__ inline StageCounts count_stages(const DecodeParams& params, int32_t index) {
  const DecodeSequence sequence = decode_sequence(params, index);
  if (sequence.queries <= 0 || sequence.length == 0) {
    return {0, 0};
  }
  const int32_t keys = blocks_before(params, sequence.length - 1);
  const int32_t seen = sequence.length - max(sequence.position(0) + 1 - params.window, 0);
  return {static_cast<int32_t>(params.by_stage_keys.divide(static_cast<uint32_t>(keys + params.stage_keys() - 1))),
          (seen + decode_sm90::kStageKeys - 1) / decode_sm90::kStageKeys};
}

// Stages of all sequences, and those before one of them.
struct StageTotals {
  int32_t all;
  int32_t before;
};

// Stages of all tiles of a sequence.
__device__ inline int32_t sequence_stages(const DecodeParams& params, const StageCounts& counts) {
  return counts.both() * params.heads_kv * params.row_tiles;
}
__device__ inline StageCounts counts_of_lane(const DecodeParams& params, int32_t index) {
  return index < params.batch ? count_stages(params, index) : StageCounts{0, 0};
}

// By a warp.
__device__ inline StageTotals count_all_stages(const DecodeParams& params, int32_t index) {
  int32_t all = 0;
  int32_t before = 0;
#pragma unroll 1
  for (int32_t b = this_lane(); b < params.batch; b += 32) {
    const int32_t stages = sequence_stages(params, count_stages(params, b));
    all += stages;
    before += b < index ? stages : 0;
  }
  return {__reduce_add_sync(0xffffffffu, all), __reduce_add_sync(0xffffffffu, before)};
}

// Blocks of threads that share `all` stages: number c takes those from c all / blocks on.
struct StageShares {
  int32_t all;
  int32_t blocks;

  __device__ StageShares(const DecodeParams& params, int32_t all_)
      : all(all_), blocks(min(params.range_blocks, all_)) {}
  __device__ int32_t begin(int32_t block) const {
    return static_cast<int32_t>(static_cast<uint32_t>(block) * static_cast<uint32_t>(all) /
                                static_cast<uint32_t>(blocks));
  }
  __device__ int32_t block_of(int32_t stage) const {
    return static_cast<int32_t>((static_cast<uint32_t>(stage + 1) * static_cast<uint32_t>(blocks) - 1u) /
                                static_cast<uint32_t>(all));
  }
};

// Partial sums of a tile of rows and a branch: `count` slots from `first` on.
struct Slots {
  int32_t first;
  int32_t count;
};

__device__ inline int32_t range_number(const DecodeParams& params, int32_t unit, int32_t tile, bool compressed) {
  return 2 * (unit * params.row_tiles + tile) + (compressed ? 0 : 1);
}

// A block of threads and a range have a slot: their sum, since either grows from one slot to the next.
__device__ inline Slots find_slots(const DecodeParams& params, const StageTotals& totals, const StageCounts& counts,
                                   int32_t unit, int32_t head, int32_t tile, bool compressed) {
  const int32_t number = range_number(params, unit, tile, compressed);
  const int32_t stages = compressed ? counts.compressed : counts.window;
  if (stages == 0) {
    return {0, 0};
  }
  if (params.fixed_splits > 0) {
    return {number * params.fixed_splits, (stages + params.split_stages - 1) / params.split_stages};
  }
  const StageShares shares(params, totals.all);
  const int32_t begin =
      totals.before + (head * params.row_tiles + tile) * counts.both() + (compressed ? 0 : counts.compressed);
  const int32_t first = shares.block_of(begin);
  return {first + number, shares.block_of(begin + stages - 1) - first + 1};
}

// Stages of one unit's tile of rows, all of the compressed keys or of the window.
struct RangePiece {
  DecodeUnit unit;
  int32_t unit_index;
  bool compressed;
  DecodeSequence sequence;
  int32_t first_row;
  int32_t rows;    // of the unit
  int32_t here;    // of the tile
  int32_t stage;   // its first
  int32_t stages;  // how many
  int32_t first;   // key
  int32_t count;   // of keys that any row of the tile sees
  int32_t shift;   // key i of the piece is row shift + i of the sequence: compressed block m is row m + l / d - 1
  int32_t slot;    // of its partial sums

  __device__ int32_t position(const DecodeParams& params, int32_t row) const {
    return sequence.position(static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row))));
  }
  __device__ int32_t stage_keys(const DecodeParams& params) const {
    return compressed ? params.stage_keys() : decode_sm90::kStageKeys;
  }
  __device__ const PagedRows& keys(const DecodeParams& params) const {
    return compressed ? params.compressed : params.windowed;
  }

  // Tile `tile` of a sequence's KV head; stages [stage, stage + stages).
  __device__ void set(const DecodeParams& params, int32_t index, int32_t head, int32_t tile, int32_t tile_rows) {
    unit = {index, head};
    unit_index = index * params.heads_kv + head;
    sequence = decode_sequence(params, index);
    first_row = tile * tile_rows;
    rows = sequence.queries * params.group;
    here = max(min(first_row + tile_rows, rows) - first_row, 0);
    const int32_t last = position(params, first_row + max(here, 1) - 1);
    const int32_t begin = compressed ? 0 : max(sequence.position(0) + 1 - params.window, 0);
    first = begin + stage * stage_keys(params);
    count = min(stages * stage_keys(params), (compressed ? blocks_before(params, last) : last + 1) - first);
    count = here == 0 ? 0 : max(count, 0);
    shift = first + (compressed ? params.covered - 1 : 0);
  }

  // Keys of the piece that a row sees.
  __device__ KeyRange seen(const DecodeParams& params, int32_t row) const {
    if (row >= rows) {
      return {0, 0};
    }
    const int32_t at = position(params, row);
    const int32_t end = min((compressed ? blocks_before(params, at) : at + 1) - first, count);
    return {compressed ? 0 : at + 1 - params.window - first, end};
  }
};

// The pieces of a block of threads, one after the other.
struct PieceWalk {
  const DecodeParams& params;
  int32_t at;  // the next stage of all, or the next split
  int32_t end;
  int32_t index;  // sequence
  int32_t begin;  // its first stage of all
  StageCounts counts;

  // By a warp.
  __device__ explicit PieceWalk(const DecodeParams& p)
      : params(p), at(static_cast<int32_t>(blockIdx.x)), end(p.items), index(0), begin(0), counts{0, 0} {
    if (p.fixed_splits > 0) {
      return;
    }
    // The first sequences' lengths are read once for both the sum and the search.
    const StageCounts held = counts_of_lane(p, this_lane());
    int32_t all = sequence_stages(p, held);
#pragma unroll 1
    for (int32_t b = 32 + this_lane(); b < p.batch; b += 32) {
      all += sequence_stages(p, count_stages(p, b));
    }
    const StageShares shares(p, __reduce_add_sync(0xffffffffu, all));
    at = end = 0;
    if (static_cast<int32_t>(blockIdx.x) < shares.blocks) {
      at = shares.begin(static_cast<int32_t>(blockIdx.x));
      end = shares.begin(static_cast<int32_t>(blockIdx.x) + 1);
      find_sequence(held);
    }
  }

  __device__ bool next(RangePiece& piece, int32_t tile_rows) {
    return params.fixed_splits > 0 ? next_split(piece, tile_rows) : next_share(piece, tile_rows);
  }

 private:
  // The sequence that stage `at` belongs to. `held`: those of the first 32.
  __device__ void find_sequence(StageCounts held) {
#pragma unroll 1
    for (int32_t first = 0;;) {
      const int32_t stages = sequence_stages(params, held);
      int32_t before = stages;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int32_t other = __shfl_up_sync(0xffffffffu, before, step);
        before += this_lane() >= step ? other : 0;
      }
      const unsigned past = __ballot_sync(0xffffffffu, begin + before > at);
      if (past != 0u) {
        const int lane = __ffs(static_cast<int>(past)) - 1;
        index = first + lane;
        begin += __shfl_sync(0xffffffffu, before - stages, lane);
        counts = {__shfl_sync(0xffffffffu, held.compressed, lane), __shfl_sync(0xffffffffu, held.window, lane)};
        return;
      }
      begin += __shfl_sync(0xffffffffu, before, 31);
      first += 32;
      if (first >= params.batch) {
        return;
      }
      held = counts_of_lane(params, first + this_lane());
    }
  }

  __device__ bool next_share(RangePiece& piece, int32_t tile_rows) {
    if (at >= end) {
      return false;
    }
    const int32_t tiles = params.heads_kv * params.row_tiles;
#pragma unroll 1
    while (at >= begin + counts.both() * tiles) {
      begin += counts.both() * tiles;
      counts = count_stages(params, ++index);
    }
    const int32_t inside = at - begin;
    const int32_t number = inside / counts.both();
    const int32_t stage = inside - number * counts.both();
    piece.compressed = stage < counts.compressed;
    piece.stage = piece.compressed ? stage : stage - counts.compressed;
    piece.stages = min((piece.compressed ? counts.compressed : counts.window) - piece.stage, end - at);
    const int32_t head = static_cast<int32_t>(params.by_row_tiles.divide(static_cast<uint32_t>(number)));
    const int32_t tile = number - head * params.row_tiles;
    piece.set(params, index, head, tile, tile_rows);
    piece.slot = static_cast<int32_t>(blockIdx.x) + range_number(params, piece.unit_index, tile, piece.compressed);
    at += piece.stages;
    return true;
  }

  // Item: range, then split.
  __device__ bool next_split(RangePiece& piece, int32_t tile_rows) {
#pragma unroll 1
    for (; at < end; at += static_cast<int32_t>(gridDim.x)) {
      const int32_t number = at / params.fixed_splits;
      const int32_t split = at - number * params.fixed_splits;
      const int32_t tile_number = number / 2;
      const int32_t unit = static_cast<int32_t>(params.by_row_tiles.divide(static_cast<uint32_t>(tile_number)));
      const DecodeUnit of = decode_unit(params, unit);
      const StageCounts held = count_stages(params, of.index);
      piece.compressed = number % 2 == 0;
      piece.stage = split * params.split_stages;
      piece.stages = min((piece.compressed ? held.compressed : held.window) - piece.stage, params.split_stages);
      if (piece.stages > 0) {
        piece.set(params, of.index, of.head, tile_number - unit * params.row_tiles, tile_rows);
        piece.slot = at;
        at += static_cast<int32_t>(gridDim.x);
        return true;
      }
    }
    return false;
  }
};

}  // namespace nsa
