// The first kernel of a step on Hopper: partial sums of the compressed and of the window branch, and what their keys
// weigh in the importance of selection blocks. Blocks of threads stay, and take one split after the other; the ring is
// filled for the next one while the last is summed up.
#pragma once

#include "decode/chain.cuh"
#include "decode/sm90/stage.cuh"

namespace nsa {

template <typename Shape>
struct RangesShared {
  using Element = typename Shape::Element;
  Ring<Shape> ring;
  Element queries[2][Shape::QTile::kSize];
  Element weights[Shape::WeightTile::kSize];
  float kept[Shape::kRows * decode_sm90::kKeptPitch];
  ConsumerExchange<Shape> exchange;
  Barrier full[Shape::kStages];
  Barrier empty[Shape::kStages];
  Barrier queries_full[2];
  Barrier queries_empty[2];
};

// Split, tile of rows and unit of an item. Heads follow one another: their keys lie side by side, and are read at a time.
__device__ inline RangeSplit split_of_item(const DecodeParams& params, int32_t item, int32_t tile_rows) {
  const int32_t of_heads = static_cast<int32_t>(params.by_heads_kv.divide(static_cast<uint32_t>(item)));
  const int32_t tile = static_cast<int32_t>(params.by_all_splits.divide(static_cast<uint32_t>(of_heads)));
  const int32_t sequence = static_cast<int32_t>(params.by_row_tiles.divide(static_cast<uint32_t>(tile)));
  const int32_t unit = sequence * params.heads_kv + item - of_heads * params.heads_kv;
  return {params, of_heads - tile * params.all_splits(), unit, (tile - sequence * params.row_tiles) * tile_rows,
          tile_rows};
}

// Keys of a split that a stage takes, and how many stages its keys need.
__device__ inline int32_t keys_of_stage(const DecodeParams& params, const RangeSplit& split) {
  return split.compressed ? params.stage_keys() : decode_sm90::kStageKeys;
}
__device__ inline int32_t stages_of(const RangeSplit& split, int32_t stage_keys) {
  return (split.count + stage_keys - 1) / stage_keys;
}

template <typename Shape>
__device__ inline void produce_ranges(const DecodeParams& params, RangesShared<Shape>& shared) {
  RingPlace<Shape::kStages> place;
  RingPlace<2> queries;
#pragma unroll 1
  for (int32_t item = static_cast<int32_t>(blockIdx.x); item < params.items; item += static_cast<int32_t>(gridDim.x)) {
    const RangeSplit split = split_of_item(params, item, Shape::kRows);
    if (split.count == 0) {
      continue;
    }
    const PagedRows& keys = split.keys(params);
    const int32_t stage_keys = keys_of_stage(params, split);
    const int32_t stages = stages_of(split, stage_keys);
    const int32_t row = static_cast<int32_t>(threadIdx.x);
    const auto locate = [&](int32_t stage) {
      const int32_t i = stage * stage_keys + row;
      return stage < stages && row < stage_keys && i < split.count
                 ? locate_row(params, keys, split.unit.index, split.shift + i)
                 : nowhere();
    };
    RowOffsets next = locate(0);
    wait(&shared.queries_empty[queries.stage], queries.parity ^ 1);
    fill_queries<Shape>(shared.queries[queries.stage], params, split.sequence, split.unit.head, split.first_row,
                        split.rows);
    arrive_after_copies(&shared.queries_full[queries.stage]);
    queries.advance();
    const HeadPools<typename Shape::Element> pools(keys, split.unit.head);
#pragma unroll 1
    for (int32_t stage = 0; stage < stages; ++stage) {
      const RowOffsets now = next;
      next = locate(stage + 1);
      wait(&shared.empty[place.stage], place.parity ^ 1);
      fill_stage<Shape>(shared.ring, place.stage, &shared.full[place.stage], pools, now);
      place.advance();
    }
  }
}

// Where rows of a unit lie in the arrays of stages.
__device__ inline int32_t padded_row(const DecodeParams& params, int32_t row) {
  const int32_t query = static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
  return query * params.padded_group + row - query * params.group;
}

template <typename Shape>
struct RangesConsumer {
  const DecodeParams& params;
  RangesShared<Shape>& shared;

  __device__ static int thread() { return static_cast<int>(threadIdx.x) - Shape::kProducers; }

  __device__ SeenKeys<Shape> seen_keys(const RangeSplit& split) const {
    SeenKeys<Shape> seen;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyRange range = split.seen(params, split.first_row + lane_row(r, half));
        seen.low[r][half] = static_cast<int32_t>(range.begin);
        seen.high[r][half] = static_cast<int32_t>(range.end);
      }
    }
    return seen;
  }

  // Of a stage of compressed keys: what they weigh, and the highest scores that this is relative to.
  __device__ void store_stage(const RangeSplit& split, const StageSums<Shape>& sums, int32_t stage,
                              int32_t count) const {
    const int64_t number = static_cast<int64_t>(split.unit_index) * params.stages +
                           split.number * params.split_stages() + stage;
    store_highest(split, number, [&](int r, int half) { return sums.highest[r][half]; });
    const int row = thread() % Shape::kRows;
    if (row >= split.here) {
      return;
    }
    float* const to = params.stage_weights + number * params.weights_of_stage() * params.padded_rows() +
                      padded_row(params, split.first_row + row);
#pragma unroll 1
    for (int32_t block = thread() / Shape::kRows; block < params.weights_of_stage();
         block += Shape::kConsumers / Shape::kRows) {
      to[static_cast<int64_t>(block) * params.padded_rows()] =
          block_weight(params, shared.kept + row * decode_sm90::kKeptPitch, count, block);
    }
  }

  template <typename Highest>
  __device__ void store_highest(const RangeSplit& split, int64_t number, const Highest& highest_of) const {
    if (consumer_warp<Shape>() != 0 || this_lane() % 4 != 0) {
      return;
    }
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane_row(r, half) < split.here) {
          params.stage_highest[number * params.padded_rows() +
                               padded_row(params, split.first_row + lane_row(r, half))] = highest_of(r, half);
        }
      }
    }
  }

  // Stages that hold no keys.
  __device__ void store_empty_stages(const RangeSplit& split, int32_t first) const {
#pragma unroll 1
    for (int32_t stage = first; split.compressed && stage < params.split_stages(); ++stage) {
      const int32_t number = split.number * params.split_stages() + stage;
      if (number < params.stages) {
        store_highest(split, static_cast<int64_t>(split.unit_index) * params.stages + number,
                      [](int, int) { return kMinusInfinity; });
      }
    }
  }

  __device__ void store_sums(const RangeSplit& split, const StageSums<Shape>& sums) const {
    const int64_t place = split.place(params);
    share_totals(shared.exchange, sums);
    sync_consumers<Shape>();
    float* const out = params.range_out + place * Shape::kDimV + Shape::kColumns * consumer_warp<Shape>();
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row(r, half);
        if (row >= split.here) {
          continue;
        }
        if (consumer_warp<Shape>() == 0 && this_lane() % 4 == 0) {
          params.range_sums[place + row] = {sums.highest[r][half], total_of_row(shared.exchange, row)};
        }
#pragma unroll
        for (int c = 0; c < Shape::kColumns / 8; ++c) {
          *reinterpret_cast<float2*>(out + row * Shape::kDimV + 8 * c + 2 * (this_lane() % 4)) =
              make_float2(sums.out[r][c][2 * half], sums.out[r][c][2 * half + 1]);
        }
      }
    }
  }

  __device__ void store_nothing(const RangeSplit& split) const {
    RowSums* const to = params.range_sums + split.place(params);
#pragma unroll 1
    for (int32_t row = thread(); row < split.here; row += Shape::kConsumers) {
      to[row] = {kMinusInfinity, 0.f};
    }
    store_empty_stages(split, 0);
  }

  __device__ void consume(const RangeSplit& split, RingPlace<Shape::kStages>& place, int queries) const {
    const SeenKeys<Shape> seen = seen_keys(split);
    const StageConsumer<Shape> consumer{{shared.queries[queries]}, {shared.weights}, shared.exchange,
                                        split.compressed ? shared.kept : nullptr, params.scale_log2};
    StageSums<Shape> sums;
    const int32_t stage_keys = keys_of_stage(params, split);
    const int32_t stages = stages_of(split, stage_keys);
#pragma unroll 1
    for (int32_t stage = 0; stage < stages; ++stage) {
      const int32_t first = stage * stage_keys;
      wait(&shared.full[place.stage], place.parity);
      consumer.attend(sums, shared.ring, place.stage, seen, first, first + stage_keys);
      __syncwarp();
      if (this_lane() == 0) {
        arrive(&shared.empty[place.stage]);
      }
      place.advance();
      if (split.compressed) {
        store_stage(split, sums, stage, min(split.count - first, stage_keys));
      }
    }
    store_sums(split, sums);
    store_empty_stages(split, stages);
  }

  __device__ void run() const {
    RingPlace<Shape::kStages> place;
    RingPlace<2> queries;
#pragma unroll 1
    for (int32_t item = static_cast<int32_t>(blockIdx.x); item < params.items;
         item += static_cast<int32_t>(gridDim.x)) {
      const RangeSplit split = split_of_item(params, item, Shape::kRows);
      if (split.count == 0) {
        store_nothing(split);
        continue;
      }
      wait(&shared.queries_full[queries.stage], queries.parity);
      consume(split, place, queries.stage);
      __syncwarp();
      if (this_lane() == 0) {
        arrive(&shared.queries_empty[queries.stage]);
      }
      queries.advance();
    }
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) decode_ranges_sm90(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  RangesShared<Shape>& shared = *reinterpret_cast<RangesShared<Shape>*>(shared_bytes);
  if (threadIdx.x == 0) {
    init_ring(shared.full, shared.empty, Shape::kProducers, Shape::kWarps);
    init_ring(shared.queries_full, shared.queries_empty, Shape::kProducers, Shape::kWarps);
  }
  __syncthreads();
  wait_for_previous();
  start_next();
  if (this_warp() < decode_sm90::kProducerWarps) {
    produce_ranges(params, shared);
  } else {
    RangesConsumer<Shape>{params, shared}.run();
  }
}

}  // namespace nsa
