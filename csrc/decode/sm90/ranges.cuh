// The first kernel of a step on Hopper: partial sums of the compressed and of the window branch, and what their keys
// weigh in the importance of selection blocks. The ring is filled for the next piece while the last is summed up.
#pragma once

#include "decode/chain.cuh"
#include "decode/sm90/schedule.cuh"
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
  RingBarriers<Shape> barriers;
  Barrier queries_full[2];
  Barrier queries_empty[2];
};

template <typename Shape>
__device__ inline void produce_ranges(const DecodeParams& params, RangesShared<Shape>& shared, PieceWalk walk) {
  RingPlace<Shape::kStages> place;
  RingPlace<2> queries;
  RangePiece piece;
#pragma unroll 1
  while (walk.next(piece, params.tile_rows)) {
    const PagedRows& keys = piece.keys(params);
    const int32_t stage_keys = piece.stage_keys(params);
    const int32_t row = static_cast<int32_t>(threadIdx.x);
    const auto locate = [&](int32_t stage) {
      const int32_t i = stage * stage_keys + row;
      return row < stage_keys && i < piece.count ? locate_row(params, keys, piece.unit.index, piece.shift + i)
                                                 : nowhere();
    };
    RowOffsets next = locate(0);
    wait(&shared.queries_empty[queries.stage], queries.parity ^ 1);
    fill_queries<Shape>(shared.queries[queries.stage], params, piece.sequence, piece.unit.head, piece.first_row,
                        piece.rows);
    arrive_after_copies(&shared.queries_full[queries.stage]);
    queries.advance();
    const HeadPools<typename Shape::Element> pools(keys, piece.unit.head);
#pragma unroll 1
    for (int32_t stage = 0; stage < piece.stages; ++stage) {
      const RowOffsets now = next;
      next = locate(stage + 1);
      fill_stage<Shape>(shared.ring, shared.barriers, place, pools, now);
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

  __device__ SeenKeys<Shape> seen_keys(const RangePiece& piece) const {
    SeenKeys<Shape> seen;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyRange range = piece.seen(params, piece.first_row + lane_row(r, half));
        seen.low[r][half] = static_cast<int32_t>(range.begin);
        seen.high[r][half] = static_cast<int32_t>(range.end);
      }
    }
    return seen;
  }

  // Of a stage of compressed keys: what `count` of them weigh, and the highest scores that this is relative to.
  __device__ void store_stage(const RangePiece& piece, const StageSums<Shape>& sums, int32_t stage,
                              int32_t count) const {
    const int64_t number = static_cast<int64_t>(piece.unit_index) * params.stages + stage;
    store_highest(piece, number, sums);
    const int row = thread() % Shape::kRows;
    if (row >= piece.here) {
      return;
    }
    float* const to = params.stage_weights + number * params.weights_of_stage() * params.padded_rows() +
                      padded_row(params, piece.first_row + row);
    const float* const from = shared.kept + row * decode_sm90::kKeptPitch;
    // The last head's thread also writes zeros for those that fill up the group.
    const int32_t head = row - params.group * static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
    const int32_t padding = head == params.group - 1 ? params.padded_group - params.group : 0;
#pragma unroll 1
    for (int32_t block = thread() / Shape::kRows; block < params.weights_of_stage();
         block += Shape::kConsumers / Shape::kRows) {
      to[block * params.padded_rows()] = block_weight(params, from, count, block);
#pragma unroll 1
      for (int32_t i = 1; i <= padding; ++i) {
        to[block * params.padded_rows() + i] = 0.f;
      }
    }
  }

  __device__ void store_highest(const RangePiece& piece, int64_t number, const StageSums<Shape>& sums) const {
    if (consumer_warp<Shape>() != 0 || this_lane() % 4 != 0) {
      return;
    }
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane_row(r, half) < piece.here) {
          params.stage_highest[number * params.padded_rows() +
                               padded_row(params, piece.first_row + lane_row(r, half))] = sums.highest[r][half];
        }
      }
    }
  }

  __device__ void store_sums(const RangePiece& piece, const StageSums<Shape>& sums) const {
    const int64_t place = static_cast<int64_t>(piece.slot) * params.tile_rows;
    share_totals(shared.exchange, sums);
    sync_consumers<Shape>();
    float* const out = params.range_out + place * Shape::kDimV + Shape::kColumns * consumer_warp<Shape>();
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row(r, half);
        if (row >= piece.here) {
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

  __device__ void consume(const RangePiece& piece, RingPlace<Shape::kStages>& place, int queries) const {
    const SeenKeys<Shape> seen = seen_keys(piece);
    const StageConsumer<Shape> consumer{{shared.queries[queries]}, {shared.weights}, shared.exchange,
                                        piece.compressed ? shared.kept : nullptr, params.scale_log2};
    StageSums<Shape> sums;
    const int32_t stage_keys = piece.stage_keys(params);
#pragma unroll 1
    for (int32_t stage = 0; stage < piece.stages; ++stage) {
      const int32_t first = stage * stage_keys;
      consumer.attend(sums, shared.ring, shared.barriers, place, seen, first, first + stage_keys);
      place.advance();
      if (piece.compressed) {
        store_stage(piece, sums, piece.stage + stage, max(min(piece.count - first, stage_keys), 0));
      }
    }
    store_sums(piece, sums);
  }

  __device__ void run(PieceWalk walk) const {
    RingPlace<Shape::kStages> place;
    RingPlace<2> queries;
    RangePiece piece;
#pragma unroll 1
    while (walk.next(piece, params.tile_rows)) {
      wait(&shared.queries_full[queries.stage], queries.parity);
      consume(piece, place, queries.stage);
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
    shared.barriers.init();
    init_ring(shared.queries_full, shared.queries_empty, Shape::kProducers, Shape::kWarps);
  }
  const PieceWalk walk(params);
  __syncthreads();
  wait_for_previous();
  start_next();
  if (this_warp() < decode_sm90::kProducerWarps) {
    produce_ranges(params, shared, walk);
  } else {
    RangesConsumer<Shape>{params, shared}.run(walk);
  }
}

}  // namespace nsa
