// The first kernel of a step on Hopper: partial sums of the compressed and of the window branch, and what their keys
// weigh in the importance of selection blocks. The ring is filled for the next piece while the last is summed up.
#pragma once

#include "decode/chain.cuh"
#include "decode/sm90/consumer.cuh"
#include "decode/sm90/schedule.cuh"

namespace nsa {

template <typename Shape>
struct RangesShared {
  using Element = typename Shape::Element;
  static constexpr int kKept = decode_sm90::kept_buffers(Shape::kRowTiles);
  Ring<Shape> ring;
  Element queries[2][Shape::QTile::kSize];
  Element weights[Shape::WeightTile::kSize];
  float kept[kKept][Shape::kRows * decode_sm90::kKeptPitch];
  ConsumerExchange<Shape> exchange;
  RingBarriers<Shape> barriers;
  Barrier queries_full[2];
  Barrier queries_empty[2];
  Barrier kept_full[kKept];
  Barrier kept_empty[kKept];
};

// Where rows of a unit lie in the arrays of stages.
__device__ inline int32_t padded_row(const DecodeParams& params, int32_t row) {
  const int32_t query = static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
  return query * params.padded_group + row - query * params.group;
}

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

// Adds up by selection blocks what the consumers' weights are.
template <typename Shape>
struct RangesWeigher {
  const DecodeParams& params;
  RangesShared<Shape>& shared;

  __device__ static int thread() { return static_cast<int>(threadIdx.x) - Shape::kProducers - Shape::kConsumers; }

  // Of stage `number` of all: what `count` keys weigh.
  __device__ void weigh_stage(const RangePiece& piece, int32_t number, int32_t count, const float* weights) const {
    const int row = thread() % Shape::kRows;
    if (row >= piece.here) {
      return;
    }
    const int32_t pitch = params.padded_rows();
    float* const to = params.stage_weights + static_cast<int64_t>(number) * params.weights_of_stage() * pitch +
                      padded_row(params, piece.first_row + row);
    const float* const from = weights + row * decode_sm90::kKeptPitch;
    // The last head's thread also writes zeros for those that fill up the group.
    const int32_t head = row - params.group * static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
    const int32_t padding = head == params.group - 1 ? params.padded_group - params.group : 0;
#pragma unroll 2
    for (int32_t block = thread() / Shape::kRows; block < params.weights_of_stage();
         block += Shape::kProducers / Shape::kRows) {
      to[block * pitch] = block_weight(params, from, count, block);
#pragma unroll 1
      for (int32_t i = 1; i <= padding; ++i) {
        to[block * pitch + i] = 0.f;
      }
    }
  }

  __device__ void run(PieceWalk walk) const {
    RingPlace<RangesShared<Shape>::kKept> kept;
    RangePiece piece;
#pragma unroll 1
    while (walk.next(piece, params.tile_rows)) {
      const int32_t stage_keys = piece.stage_keys(params);
#pragma unroll 1
      for (int32_t stage = 0; piece.compressed && stage < piece.stages; ++stage) {
        wait(&shared.kept_full[kept.stage], kept.parity);
        weigh_stage(piece, piece.unit_index * params.stages + piece.stage + stage,
                    max(min(piece.count - stage * stage_keys, stage_keys), 0), shared.kept[kept.stage]);
        arrive(&shared.kept_empty[kept.stage]);
        kept.advance();
      }
    }
  }
};

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

  // Of a stage of compressed keys: the highest scores that its weights are relative to.
  __device__ void store_highest(const RangePiece& piece, int64_t number, const StageSums<Shape>& sums) const {
    if (consumer_warp<Shape>() != 0 || this_lane() % 4 != 0) {
      return;
    }
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane_row(r, half) < piece.here) {
          params
              .stage_highest[number * params.padded_rows() + padded_row(params, piece.first_row + lane_row(r, half))] =
              sums.highest[r][half];
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

  __device__ void consume(const RangePiece& piece, RingPlace<Shape::kStages>& place,
                          RingPlace<RangesShared<Shape>::kKept>& kept, int buffer) const {
    const SeenKeys<Shape> seen = seen_keys(piece);
    const QueryOperands<Shape> queries(shared.queries[buffer]);
    const StageConsumer<Shape> consumer{queries, {shared.weights}, shared.exchange, params.scale_log2};
    StageSums<Shape> sums;
    const int32_t stage_keys = piece.stage_keys(params);
#pragma unroll 1
    for (int32_t stage = 0; stage < piece.stages; ++stage) {
      const int32_t first = stage * stage_keys;
      if (piece.compressed) {
        wait(&shared.kept_empty[kept.stage], kept.parity ^ 1);
      }
      consumer.attend(sums, shared.ring, shared.barriers, place, seen, first, first + stage_keys,
                      piece.compressed ? shared.kept[kept.stage] : nullptr);
      place.advance();
      if (piece.compressed) {
        arrive(&shared.kept_full[kept.stage]);
        kept.advance();
        store_highest(piece, static_cast<int64_t>(piece.unit_index) * params.stages + piece.stage + stage, sums);
      }
    }
    store_sums(piece, sums);
  }

  __device__ void run(PieceWalk walk) const {
    RingPlace<Shape::kStages> place;
    RingPlace<2> queries;
    RingPlace<RangesShared<Shape>::kKept> kept;
    RangePiece piece;
#pragma unroll 1
    while (walk.next(piece, params.tile_rows)) {
      wait(&shared.queries_full[queries.stage], queries.parity);
      consume(piece, place, kept, queries.stage);
      __syncwarp();
      if (this_lane() == 0) {
        arrive(&shared.queries_empty[queries.stage]);
      }
      queries.advance();
    }
  }
};

// Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(decode_sm90::kRangesThreads, 1)
    decode_ranges_sm90(const __grid_constant__ DecodeParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  RangesShared<Shape>& shared = *reinterpret_cast<RangesShared<Shape>*>(shared_bytes);
  if (threadIdx.x == 0) {
    shared.barriers.init();
    init_ring(shared.queries_full, shared.queries_empty, Shape::kProducers, Shape::kWarps);
    init_ring(shared.kept_full, shared.kept_empty, Shape::kConsumers, Shape::kProducers);
  }
  const PieceWalk walk(params);
  __syncthreads();
  wait_for_previous();
  start_next();
  const int warp = __shfl_sync(0xffffffffu, this_warp(), 0);
  if (warp < decode_sm90::kProducerWarps) {
    shrink_registers<88>();
    produce_ranges(params, shared, walk);
  } else if (warp < decode_sm90::kProducerWarps + Shape::kWarps) {
    grow_registers<168>();
    RangesConsumer<Shape>{params, shared}.run(walk);
  } else {
    shrink_registers<88>();
    RangesWeigher<Shape>{params, shared}.run(walk);
  }
#endif
}

}  // namespace nsa
