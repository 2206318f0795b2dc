// The second kernel of a step on Hopper: the choice of blocks of one query, attention to them, and the sum of the three
// branches. A cluster shares a query: each block of threads ranks some of the blocks, all choose from all ranks, each
// attends to some of the chosen ones, and each writes some of the output.
#pragma once

#include "common/gates.cuh"
#include "decode/chain.cuh"
#include "decode/parts.cuh"
#include "decode/ranks.cuh"
#include "decode/sm90/cluster.cuh"
#include "decode/sm90/highest.cuh"
#include "decode/sm90/stage.cuh"

namespace nsa {

constexpr int kMostCluster = decode_sm90::kMostCluster;

template <typename Shape>
struct ChosenShared {
  using Element = typename Shape::Element;
  static constexpr int kFours = Shape::kRows * Shape::kDimV / 4;
  Ring<Shape> ring;  // before it is filled: the rank of each selection block
  Element queries[Shape::QTile::kSize];
  Element weights[Shape::WeightTile::kSize];
  ConsumerExchange<Shape> exchange;
  float4 gated[kFours];                          // the other branches' sum, of this block of threads' share
  float4 parts[kFours];                          // (cluster, share)
  RowSums part_sums[kMostCluster][Shape::kRows];  // of all rows
  float4 adding[Shape::kConsumers];
  RowSums ranges[2][Shape::kRows];   // of the compressed branch and of the window, over all splits
  float gates[3][Shape::kRows];
  int32_t pages[decode_sm90::kCachedPages];
  int32_t list[64];
  Barrier full[Shape::kStages];
  Barrier empty[Shape::kStages];
  Barrier queries_full;

  __device__ uint32_t* ranks() { return reinterpret_cast<uint32_t*>(&ring); }
};

// The query of a cluster, as one of its blocks of threads sees it.
template <typename Shape>
struct ChosenPart {
  using Element = typename Shape::Element;
  const DecodeParams& params;
  ChosenShared<Shape>& shared;
  int32_t unit_index;
  DecodeUnit unit;
  DecodeSequence sequence;
  int32_t query;
  int32_t block;      // of threads, in the cluster
  int32_t own_block;  // of the query
  int32_t chosen;     // how many blocks are
  int32_t share;      // fours of the output for each block of threads

  __device__ ChosenPart(const DecodeParams& p, ChosenShared<Shape>& s)
      : params(p),
        shared(s),
        unit_index(static_cast<int32_t>(blockIdx.y)),
        unit(decode_unit(p, unit_index)),
        sequence(decode_sequence(p, unit.index)),
        query(static_cast<int32_t>(blockIdx.z)),
        block(static_cast<int32_t>(blockIdx.x)) {
    const int32_t position = sequence.position(query);
    own_block = position < 0 ? -1 : static_cast<int32_t>(p.by_select_size.divide(static_cast<uint32_t>(position)));
    chosen = min(p.num_selected, own_block + 1);
    share = (p.group * (Shape::kDimV / 4) + p.cluster - 1) / p.cluster;
  }
  __device__ int32_t first_row() const { return query * params.group; }

  // The pages of the sequence, where they all have room.
  __device__ bool caches_pages() const { return params.selected.table_width <= decode_sm90::kCachedPages; }
  __device__ void cache_pages() const {
    if (caches_pages()) {
#pragma unroll 1
      for (int32_t i = static_cast<int32_t>(threadIdx.x); i < params.selected.table_width; i += Shape::kThreads) {
        shared.pages[i] = params.selected.table[unit.index * params.selected.table_stride + i];
      }
    }
  }

  // Each row's highest score and sum over all splits, of both branches. By the consumers, 16 for each row.
  __device__ void join_ranges() const {
    const int32_t lane = this_lane() % 16;
    const int32_t begin = static_cast<int32_t>(threadIdx.x) - Shape::kProducers;
#pragma unroll 1
    for (int32_t i = begin / 16; i < 2 * Shape::kRows; i += Shape::kConsumers / 16) {
      const int32_t branch = i / Shape::kRows;
      const int32_t g = i % Shape::kRows;
      const int32_t splits = g >= params.group ? 0 : branch == 0 ? params.splits : params.window_splits;
      const RowSums* const of_row =
          params.range_sums +
          (static_cast<int64_t>(unit_index) * params.all_splits() + (branch == 0 ? 0 : params.splits)) * params.rows() +
          first_row() + g;
      RowSums joined{kMinusInfinity, 0.f};
#pragma unroll 2
      for (int32_t s = lane; s < splits; s += 16) {
        const float2 x = __ldcg(reinterpret_cast<const float2*>(of_row + static_cast<int64_t>(s) * params.rows()));
        join(joined, {x.x, x.y});
      }
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        join(joined, {__shfl_xor_sync(0xffffffffu, joined.highest, step),
                      __shfl_xor_sync(0xffffffffu, joined.sum, step)});
      }
      if (lane == 0) {
        shared.ranges[branch][g] = joined;
      }
    }
  }
  __device__ static void join(RowSums& sums, const RowSums& x) {
    const float highest = fmaxf(sums.highest, x.highest);
    if (highest != kMinusInfinity) {
      sums.sum = sums.sum * exp2_approx(sums.highest - highest) + x.sum * exp2_approx(x.highest - highest);
    }
    sums.highest = highest;
  }

  __device__ void read_gates() const {
    const int32_t g = static_cast<int32_t>(threadIdx.x);
    if (g < params.group) {
      float gates[3];
      load_gates(gates, params.gates, sequence.batch, sequence.first + query, unit.head * params.group + g);
#pragma unroll
      for (int b = 0; b < 3; ++b) {
        shared.gates[b][g] = gates[b];
      }
    }
  }

  // Column `at` of a stage's weights, as probabilities, summed over the group.
  __device__ float sum_heads(int32_t stage, int32_t at) const {
    const int64_t number = static_cast<int64_t>(unit_index) * params.stages + stage;
    const float4* const weights = reinterpret_cast<const float4*>(
        params.stage_weights + (number * params.weights_of_stage() + at) * params.padded_rows() +
        query * params.padded_group);
    const float4* const highest = reinterpret_cast<const float4*>(params.stage_highest + number * params.padded_rows() +
                                                                  query * params.padded_group);
    float sum = 0.f;
#pragma unroll 4
    for (int32_t i = 0; i < params.padded_group / 4; ++i) {
      const float4 w = __ldcg(weights + i);
      const float4 h = __ldcg(highest + i);
      add_head(sum, 4 * i, w.x, h.x);
      add_head(sum, 4 * i + 1, w.y, h.y);
      add_head(sum, 4 * i + 2, w.z, h.z);
      add_head(sum, 4 * i + 3, w.w, h.w);
    }
    return sum;
  }
  __device__ void add_head(float& sum, int32_t g, float weight, float highest) const {
    const RowSums joined = shared.ranges[0][g];
    if (g < params.group && highest != kMinusInfinity) {
      sum = fmaf(weight, exp2_approx(highest - joined.highest) * joined.sum, sum);  // 1 / sum: see invert_sums
    }
  }

  // Of both branches' sums: the compressed one's inverse, and what a split's output is multiplied with.
  __device__ void invert_sums() const {
    const int32_t g = static_cast<int32_t>(threadIdx.x) - Shape::kProducers;
    if (g >= 0 && g < 2 * Shape::kRows) {
      RowSums& joined = shared.ranges[g / Shape::kRows][g % Shape::kRows];
      joined.sum = joined.sum == 0.f ? 0.f : 1.f / joined.sum;
    }
  }

  // Ranks some of the blocks for all blocks of threads of the cluster.
  __device__ void rank_blocks() const {
    const int32_t each = (own_block + params.cluster) / params.cluster;  // (own_block + 1) / cluster, rounded up
    const int32_t end = min((block + 1) * each, own_block + 1);
    const uint32_t to = shared_address(shared.ranks());
#pragma unroll 1
    for (int32_t b = block * each + static_cast<int32_t>(threadIdx.x); b < end; b += Shape::kThreads) {
      const int32_t stage = static_cast<int32_t>(params.by_stage_blocks.divide(static_cast<uint32_t>(b)));
      const int32_t at = b - stage * params.stage_blocks;
      float importance = sum_heads(stage, at);
      if (at < params.spill_blocks && stage > 0) {
        importance += sum_heads(stage - 1, params.stage_blocks + at);
      }
      const uint32_t rank = rank_of(params.forced, b, own_block, importance);
#pragma unroll 1
      for (int32_t other = 0; other < params.cluster; ++other) {
        store_there(address_in(to + 4 * b, other), rank);
      }
    }
  }

  // By one warp.
  __device__ void choose() const {
    const uint32_t* const ranks = shared.ranks();
    const int32_t count = own_block + 1;
    RankThreshold threshold;
    if (count <= 256) {
      threshold = find_threshold(HeldRanks<8>(ranks, count), chosen);
    } else if (count <= 1024) {
      threshold = find_threshold(HeldRanks<32>(ranks, count), chosen);
    } else {
      threshold = find_threshold(SharedRanks{ranks, count}, chosen);
    }
    write_chosen(threshold, ranks, count, chosen, shared.list);
  }

  // The part's keys: those of its blocks that the query sees.
  __device__ int32_t first_of_list() const { return block * params.part_blocks; }
  __device__ int32_t count_keys() const {
    const int32_t blocks = min(params.part_blocks, chosen - first_of_list());
    if (blocks <= 0) {
      return 0;
    }
    const int32_t past =
        (shared.list[first_of_list() + blocks - 1] + 1) * params.select_size - 1 - sequence.position(query);
    return blocks * params.select_size - max(past, 0);
  }
  __device__ RowOffsets locate(int32_t i) const {
    const PagedRows& keys = params.selected;
    const int32_t at = static_cast<int32_t>(params.by_select_size.divide(static_cast<uint32_t>(i)));
    const int32_t row = (shared.list[first_of_list() + at] - at) * params.select_size + i;
    const int32_t page = static_cast<int32_t>(keys.by_page.divide(static_cast<uint32_t>(row)));
    const int32_t number = caches_pages() ? checked_page(params, keys, page < keys.table_width ? shared.pages[page] : -1)
                                          : page_at(params, keys, unit.index, page);
    return row_of_page(keys, number, row - page * keys.rows_per_page);
  }

  __device__ void produce(int32_t count) const {
    const HeadPools<Element> pools(params.selected, unit.head);
    RingPlace<Shape::kStages> place;
#pragma unroll 1
    for (int32_t first = 0; first < count; first += Shape::kKeys) {
      const int32_t i = first + static_cast<int32_t>(threadIdx.x);
      const RowOffsets row = i < count ? locate(i) : nowhere();
      wait(&shared.empty[place.stage], place.parity ^ 1);
      fill_stage<Shape>(shared.ring, place.stage, &shared.full[place.stage], pools, row);
      place.advance();
    }
  }

  // What the splits of a row's both branches are multiplied with.
  __device__ float weight_of_split(int32_t g, int32_t split) const {
    const int32_t branch = split < params.splits ? 0 : 1;
    const RowSums joined = shared.ranges[branch][g];
    const float highest = __ldcg(&params.range_sums[(static_cast<int64_t>(unit_index) * params.all_splits() + split) *
                                                        params.rows() +
                                                    first_row() + g]
                                      .highest);
    return highest == kMinusInfinity
               ? 0.f
               : shared.gates[2 * branch][g] * joined.sum * exp2_approx(highest - joined.highest);
  }

  // The other branches' splits, with their gates, of this block of threads' share of the output. By the consumers.
  __device__ void add_splits() const {
    const int32_t thread = static_cast<int32_t>(threadIdx.x) - Shape::kProducers;
    const int32_t fours = params.group * (Shape::kDimV / 4);
    const int32_t groups = max(Shape::kConsumers / share, 1);
#pragma unroll 1
    for (int32_t first = 0; first < share; first += Shape::kConsumers) {
      const int32_t group = groups == 1 ? 0 : thread / share;
      const int32_t i = first + (groups == 1 ? thread : thread - group * share);
      const int32_t at = block * share + i;
      float4 sum = {0.f, 0.f, 0.f, 0.f};
      if (i < share && at < fours && group < groups) {
        const int32_t g = at / (Shape::kDimV / 4);
        const float* const from =
            params.range_out +
            (static_cast<int64_t>(unit_index) * params.all_splits() * params.rows() + first_row() + g) * Shape::kDimV +
            at % (Shape::kDimV / 4) * 4;
#pragma unroll 4
        for (int32_t s = group; s < params.all_splits(); s += groups) {
          const float weight = weight_of_split(g, s);
          const float4 x = __ldcg(reinterpret_cast<const float4*>(from + static_cast<int64_t>(s) * params.rows() *
                                                                             Shape::kDimV));
          if (weight != 0.f) {  // else its output was not written
            add_four(sum, weight, x);
          }
        }
      }
      if (groups == 1) {
        if (i < share) {
          shared.gated[i] = sum;
        }
        continue;
      }
      shared.adding[thread] = sum;
      sync_consumers<Shape>();
      if (thread < share) {
#pragma unroll 1
        for (int32_t other = 1; other < groups; ++other) {
          add_four(sum, 1.f, shared.adding[other * share + thread]);
        }
        shared.gated[thread] = sum;
      }
    }
  }
  __device__ static void add_four(float4& sum, float weight, const float4& x) {
    sum.x = fmaf(weight, x.x, sum.x);
    sum.y = fmaf(weight, x.y, sum.y);
    sum.z = fmaf(weight, x.z, sum.z);
    sum.w = fmaf(weight, x.w, sum.w);
  }

  __device__ void consume(int32_t count, StageSums<Shape>& sums) const {
    const StageConsumer<Shape> consumer{
        {shared.queries}, {shared.weights}, shared.exchange, nullptr, params.scale_log2};
    SeenKeys<Shape> seen;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      seen.low[r][0] = seen.low[r][1] = 0;
      seen.high[r][0] = seen.high[r][1] = count;
    }
    wait(&shared.queries_full, 0);
    RingPlace<Shape::kStages> place;
#pragma unroll 1
    for (int32_t first = 0; first < count; first += Shape::kKeys) {
      wait(&shared.full[place.stage], place.parity);
      consumer.attend(sums, shared.ring, place.stage, seen, first, first + Shape::kKeys);
      __syncwarp();
      if (this_lane() == 0) {
        arrive(&shared.empty[place.stage]);
      }
      place.advance();
    }
  }

  // The part's sums to the blocks of threads that write them.
  __device__ void send_part(const StageSums<Shape>& sums) const {
    share_totals(shared.exchange, sums);
    sync_consumers<Shape>();
    const uint32_t parts = shared_address(shared.parts);
    const int column = Shape::kColumns * consumer_warp<Shape>() + 2 * (this_lane() % 4);
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row(r, half);
        if (row >= params.group) {
          continue;
        }
        if (consumer_warp<Shape>() == 0 && this_lane() % 4 == 0) {
          const float total = total_of_row(shared.exchange, row);
          const uint32_t to = shared_address(&shared.part_sums[block][row]);
#pragma unroll 1
          for (int32_t other = 0; other < params.cluster; ++other) {
            store_there(address_in(to, other), sums.highest[r][half], total);
          }
        }
#pragma unroll
        for (int c = 0; c < Shape::kColumns / 8; ++c) {
          const int32_t at = row * (Shape::kDimV / 4) + (column + 8 * c) / 4;
          const int32_t owner = at / share;
          store_there(
              address_in(parts + 16 * (block * share + at - owner * share) + 4 * ((column + 8 * c) % 4), owner),
              sums.out[r][c][2 * half], sums.out[r][c][2 * half + 1]);
        }
      }
    }
  }

  // This block of threads' share of the output.
  __device__ void write_out() const {
    const int32_t fours = params.group * (Shape::kDimV / 4);
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < share && block * share + i < fours;
         i += Shape::kThreads) {
      const int32_t at = block * share + i;
      const int32_t g = at / (Shape::kDimV / 4);
      const int32_t column = at % (Shape::kDimV / 4) * 4;
      float highest = kMinusInfinity;
#pragma unroll 1
      for (int32_t c = 0; c < params.cluster; ++c) {
        highest = fmaxf(highest, shared.part_sums[c][g].highest);
      }
      float total = 0.f;
      float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (int32_t c = 0; c < params.cluster; ++c) {
        const RowSums of_part = shared.part_sums[c][g];
        const float weight = rescaling(of_part.highest, highest, 1.f);
        total = fmaf(weight, of_part.sum, total);
        add_four(sum, weight, shared.parts[c * share + i]);
      }
      float4 out = shared.gated[i];
      add_four(out, total == 0.f ? 0.f : shared.gates[1][g] / total, sum);
      Element* const to =
          params.out.row<Element>(sequence.batch, sequence.first + query, unit.head * params.group + g);
      write_four(to + column, out, params.out.width - column);
    }
  }
};

// Clusters (cluster, unit, query).
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) decode_selected_sm90(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  ChosenShared<Shape>& shared = *reinterpret_cast<ChosenShared<Shape>*>(shared_bytes);
  const ChosenPart<Shape> part(params, shared);
  if (part.query >= part.sequence.queries) {
    return;
  }
  arrive_at_cluster();  // all have begun: their shared memory is there
  if (threadIdx.x == 0) {
    init_ring(shared.full, shared.empty, Shape::kProducers, Shape::kWarps);
    init_barrier(&shared.queries_full, Shape::kProducers);
  }
  part.cache_pages();
  __syncthreads();
  wait_for_previous();
  const bool produces = this_warp() < decode_sm90::kProducerWarps;
  if (produces) {
    fill_queries<Shape>(shared.queries, params, part.sequence, part.unit.head, part.first_row(),
                        part.first_row() + params.group);
    arrive_after_copies(&shared.queries_full);
    part.read_gates();
  } else {
    part.join_ranges();
    sync_consumers<Shape>();
    part.invert_sums();
  }
  __syncthreads();
  wait_for_cluster();
  part.rank_blocks();
  sync_cluster();
  if (produces) {
    if (this_warp() == 0) {
      if (part.chosen > 0) {
        part.choose();
      }
      arrive_at_group(kListBarrier, 32 + Shape::kConsumers);
    }
    sync_producers<Shape>();
    part.produce(part.count_keys());
  } else {
    part.add_splits();
    sync_group(kListBarrier, 32 + Shape::kConsumers);
    StageSums<Shape> sums;
    part.consume(part.count_keys(), sums);
    part.send_part(sums);
  }
  sync_cluster();
  part.write_out();
}

}  // namespace nsa
