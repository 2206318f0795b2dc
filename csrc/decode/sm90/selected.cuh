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
#include "decode/sm90/schedule.cuh"
#include "decode/sm90/stage.cuh"

namespace nsa {

constexpr int kMostCluster = decode_sm90::kMostCluster;

template <typename Shape>
struct ChosenShared {
  using Element = typename Shape::Element;
  static constexpr int kFours = Shape::kRows * Shape::kDimV / 4;
  Ring<Shape> ring;  // before it is filled: what the choice needs
  Element queries[Shape::QTile::kSize];
  Element weights[Shape::WeightTile::kSize];
  ConsumerExchange<Shape> exchange;
  float4 gated[kFours];                          // the other branches' sum, of this block of threads' share
  float4 parts[kFours + kMostCluster];           // (cluster, share)
  RowSums part_sums[kMostCluster][Shape::kRows];  // of all rows
  float4 adding[Shape::kConsumers];
  RowSums ranges[2][Shape::kRows];  // of the compressed branch and of the window, over all splits: 1 / sum
  float gates[3][Shape::kRows];
  int32_t pages[decode_sm90::kCachedPages];
  int32_t list[64];
  Slots slots[2][2];  // of a branch's partial sums, for the query's first and last tile of rows
  int32_t stages;     // of compressed keys that the sequence has
  RingBarriers<Shape> barriers;
  Barrier queries_full;

  // The choice: candidates of all slices; ranks of this block of threads' blocks; then, for a stage and a head, what makes
  // weights probabilities.
  __device__ Candidate* candidates() { return reinterpret_cast<Candidate*>(&ring); }
  __device__ uint32_t* ranks() { return reinterpret_cast<uint32_t*>(candidates() + decode_sm90::kMostCandidates); }
  __device__ float* factors(int32_t ranked) {
    return reinterpret_cast<float*>(ranks() + ((ranked + 3) & ~3));
  }
};

constexpr int kRankLoads = 6;  // that a thread has under way

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

  // Tiles of rows that a row of the query is in: its first one, or the next.
  __device__ int32_t first_tile() const {
    return static_cast<int32_t>(params.by_tile_rows.divide(static_cast<uint32_t>(first_row())));
  }
  __device__ int32_t tile_of(int32_t g) const { return first_row() + g < (first_tile() + 1) * params.tile_rows ? 0 : 1; }

  // Where the partial sums lie. By one warp.
  __device__ void find_ranges() const {
    const StageTotals totals = count_all_stages(params, unit.index);
    const StageCounts counts = count_stages(params, unit.index);
    if (this_lane() < 4) {
      const int32_t branch = this_lane() / 2;
      const int32_t tile = min(first_tile() + this_lane() % 2, params.row_tiles - 1);
      shared.slots[branch][this_lane() % 2] =
          find_slots(params, totals, counts, unit_index, unit.head, tile, branch == 0);
      shared.stages = counts.compressed;
    }
  }
  // A row's place in partial sum `i` of a branch.
  __device__ int64_t range_place(int32_t branch, int32_t g, int32_t i) const {
    const int32_t tile = tile_of(g);
    return static_cast<int64_t>(shared.slots[branch][tile].first + i) * params.tile_rows + first_row() + g -
           (first_tile() + tile) * params.tile_rows;
  }

  // Each row's highest score and the inverse of its sum over all parts, of both branches. By the consumers, 16 for each row.
  __device__ void join_ranges() const {
    const int32_t lane = this_lane() % 16;
    const int32_t begin = static_cast<int32_t>(threadIdx.x) - Shape::kProducers;
#pragma unroll 1
    for (int32_t i = begin / 16; i < 2 * Shape::kRows; i += Shape::kConsumers / 16) {
      const int32_t branch = i / Shape::kRows;
      const int32_t g = i % Shape::kRows;
      const int32_t parts = g >= params.group ? 0 : shared.slots[branch][tile_of(g)].count;
      RowSums joined{kMinusInfinity, 0.f};
#pragma unroll 2
      for (int32_t s = lane; s < parts; s += 16) {
        const float2 x = __ldcg(reinterpret_cast<const float2*>(params.range_sums + range_place(branch, g, s)));
        join(joined, {x.x, x.y});
      }
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        join(joined, {__shfl_xor_sync(0xffffffffu, joined.highest, step),
                      __shfl_xor_sync(0xffffffffu, joined.sum, step)});
      }
      if (lane == 0) {
        shared.ranges[branch][g] = {joined.highest, joined.sum == 0.f ? 0.f : 1.f / joined.sum};
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

  // Blocks that this block of threads ranks: [begin, end).
  __device__ int32_t ranked_each() const { return (own_block + params.cluster) / params.cluster; }
  __device__ int32_t ranked_begin() const { return min(block * ranked_each(), own_block + 1); }
  __device__ int32_t ranked_end() const { return min((block + 1) * ranked_each(), own_block + 1); }

  // Stages of compressed keys that weigh in them: [first_stage, ...).
  __device__ int32_t stage_of(int32_t selection_block) const {
    return static_cast<int32_t>(params.by_stage_blocks.divide(static_cast<uint32_t>(selection_block)));
  }
  __device__ int32_t first_stage() const { return max(stage_of(ranked_begin()) - 1, 0); }

  // What makes a stage's weights of a head probabilities: (stage, padded group).
  __device__ void read_factors(float* factors, int32_t stages) const {
    const int32_t first = first_stage();
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < stages * params.padded_group; i += Shape::kThreads) {
      const int32_t stage = i / params.padded_group;
      const int32_t g = i - stage * params.padded_group;
      float factor = 0.f;
      if (g < params.group && first + stage < shared.stages) {
        const float highest =
            __ldcg(params.stage_highest + (static_cast<int64_t>(unit_index) * params.stages + first + stage) *
                                              params.padded_rows() +
                   query * params.padded_group + g);
        const RowSums joined = shared.ranges[0][g];
        factor = highest == kMinusInfinity ? 0.f : exp2_approx(highest - joined.highest) * joined.sum;
      }
      factors[i] = factor;
    }
  }

  // Four heads' weights of a block in a stage.
  __device__ const float4* weights_at(int32_t stage, int32_t at, int32_t lane) const {
    const int64_t number = static_cast<int64_t>(unit_index) * params.stages + stage;
    return reinterpret_cast<const float4*>(params.stage_weights +
                                           (number * params.weights_of_stage() + at) * params.padded_rows() +
                                           query * params.padded_group) +
           lane;
  }
  __device__ static float weigh_heads(const float4& weights, const float4& factors) {
    // Factors of 0 belong to what was not written.
    float sum = factors.x == 0.f ? 0.f : weights.x * factors.x;
    sum += factors.y == 0.f ? 0.f : weights.y * factors.y;
    sum += factors.z == 0.f ? 0.f : weights.z * factors.z;
    return sum + (factors.w == 0.f ? 0.f : weights.w * factors.w);
  }

  // The probability of each block in turn, as `lanes` neighbouring lanes have it together, to done(block, probability).
  template <typename Done>
  __device__ void weigh_blocks_of(const float* factors, int32_t lanes, const Done& done) const {
    const int32_t begin = ranked_begin();
    const int32_t items = (ranked_end() - begin) * lanes;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % lanes;
    const bool used = 4 * lane < params.padded_group;
#pragma unroll 1
    for (int32_t of_round = 0; of_round < items; of_round += kRankLoads * Shape::kThreads) {
      float4 weights[kRankLoads];
#pragma unroll
      for (int r = 0; r < kRankLoads; ++r) {
        const int32_t i = of_round + r * Shape::kThreads + static_cast<int32_t>(threadIdx.x);
        const int32_t b = begin + i / lanes;
        const int32_t stage = stage_of(b);
        weights[r] = i < items && used ? __ldcg(weights_at(stage, b - stage * params.stage_blocks, lane))
                                       : make_float4(0.f, 0.f, 0.f, 0.f);
      }
#pragma unroll
      for (int r = 0; r < kRankLoads; ++r) {
        const int32_t i = of_round + r * Shape::kThreads + static_cast<int32_t>(threadIdx.x);
        const int32_t b = begin + i / lanes;
        float sum = 0.f;
        if (i < items && used) {
          const int32_t stage = stage_of(b);
          const float* const of_stage = factors + (stage - first_stage()) * params.padded_group;
          sum = weigh_heads(weights[r], reinterpret_cast<const float4*>(of_stage)[lane]);
          const int32_t at = b - stage * params.stage_blocks;
          if (at < params.spill_blocks && stage > 0) {  // the last keys of the stage before reach into it
            sum += weigh_heads(__ldcg(weights_at(stage - 1, params.stage_blocks + at, lane)),
                               reinterpret_cast<const float4*>(of_stage - params.padded_group)[lane]);
          }
        }
        for (int32_t step = lanes / 2; step > 0; step /= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, step);
        }
        if (i < items && lane == 0) {
          done(b, sum);
        }
      }
    }
  }

  // By all threads, once the sums over all parts are there.
  __device__ void rank_blocks() const {
    const int32_t begin = ranked_begin();
    const int32_t ranked = ranked_end() - begin;
    if (ranked <= 0) {
      return;
    }
    float* const factors = shared.factors(ranked);
    read_factors(factors, stage_of(ranked_end() - 1) - first_stage() + 1);
    __syncthreads();
    const int32_t fours = params.padded_group / 4;
    const int32_t lanes = fours <= 1 ? 1 : fours <= 2 ? 2 : fours <= 4 ? 4 : 8;
    uint32_t* const ranks = shared.ranks();
    weigh_blocks_of(factors, lanes, [&](int32_t b, float importance) {
      ranks[b - begin] = rank_of(params.forced, b, own_block, importance);
    });
  }

  // The highest of each slice of these blocks, by a warp for each, to all blocks of threads of the cluster.
  __device__ void send_candidates() const {
    const int32_t begin = ranked_begin();
    const int32_t count = ranked_end() - begin;
    const int32_t each = (count + params.slices - 1) / params.slices;
    const uint32_t* const ranks = shared.ranks();
#pragma unroll 1
    for (int32_t slice = this_warp(); slice < params.slices; slice += Shape::kThreads / 32) {
      const int32_t first = min(slice * each, count);
      const uint32_t to = shared_address(shared.candidates() + (block * params.slices + slice) * params.num_selected);
      const auto send = [&](int32_t place, uint32_t rank, int32_t number) {
#pragma unroll 1
        for (int32_t other = 0; other < params.cluster; ++other) {
          store_there(address_in(to + static_cast<uint32_t>(sizeof(Candidate)) * place, other), __uint_as_float(rank),
                      __int_as_float(number));
        }
      };
      const int32_t taken = take_highest_of(
          min(each, count - first), [&](int32_t i) { return ranks[first + i]; }, params.num_selected,
          [&](int32_t place, int32_t i, uint32_t rank) { send(place, rank, begin + first + i); });
      for (int32_t place = taken + this_lane(); place < params.num_selected; place += 32) {
        send(place, 0u, -1);
      }
    }
  }

  // The highest of all candidates: the choice, by one warp.
  __device__ void choose() const {
    const Candidate* const candidates = shared.candidates();
    take_highest_of(
        params.cluster * params.slices * params.num_selected, [&](int32_t i) { return candidates[i].rank; },
        params.num_selected,
        [&](int32_t place, int32_t i, uint32_t) { shared.list[place] = candidates[i].block; });
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
      fill_stage<Shape>(shared.ring, shared.barriers, place, pools, i < count ? locate(i) : nowhere());
      place.advance();
    }
  }

  // A four of the other branches' sum, with their gates: every `step`-th part from `first` on.
  __device__ float4 add_parts_of(int32_t at, int32_t first, int32_t step) const {
    const int32_t g = at / (Shape::kDimV / 4);
    const int32_t column = at % (Shape::kDimV / 4) * 4;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int32_t branch = 0; branch < 2; ++branch) {
      const RowSums joined = shared.ranges[branch][g];
      const float gate = shared.gates[2 * branch][g] * joined.sum;
      const int32_t parts = shared.slots[branch][tile_of(g)].count;
#pragma unroll 4
      for (int32_t s = first; s < parts; s += step) {
        const int64_t place = range_place(branch, g, s);
        const float highest = __ldcg(&params.range_sums[place].highest);
        const float4 x = __ldcg(reinterpret_cast<const float4*>(params.range_out + place * Shape::kDimV + column));
        if (highest != kMinusInfinity) {
          add_four(sum, gate * exp2_approx(highest - joined.highest), x);
        }
      }
    }
    return sum;
  }

  // The other branches' sum, of this block of threads' share of the output. By the consumers.
  __device__ void add_ranges() const {
    const int32_t thread = static_cast<int32_t>(threadIdx.x) - Shape::kProducers;
    const int32_t end = min(share, params.group * (Shape::kDimV / 4) - block * share);
    const int32_t groups = Shape::kConsumers / share;
    if (groups <= 1) {
#pragma unroll 1
      for (int32_t i = thread; i < end; i += Shape::kConsumers) {
        shared.gated[i] = add_parts_of(block * share + i, 0, 1);
      }
      return;
    }
    const int32_t group = thread / share;
    const int32_t i = thread - group * share;
    shared.adding[thread] = group < groups && i < end ? add_parts_of(block * share + i, group, groups)
                                                      : make_float4(0.f, 0.f, 0.f, 0.f);
    sync_consumers<Shape>();
    if (thread < share) {
      float4 sum = shared.adding[thread];
#pragma unroll 1
      for (int32_t other = 1; other < groups; ++other) {
        add_four(sum, 1.f, shared.adding[other * share + thread]);
      }
      shared.gated[thread] = sum;
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
      consumer.attend(sums, shared.ring, shared.barriers, place, seen, first, first + Shape::kKeys);
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
    shared.barriers.init();
    init_barrier(&shared.queries_full, Shape::kProducers);
  }
  if (this_warp() == 1) {
    part.find_ranges();
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
  }
  __syncthreads();
  part.rank_blocks();
  __syncthreads();
  wait_for_cluster();
  part.send_candidates();
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
    part.add_ranges();
    sync_group(kListBarrier, 32 + Shape::kConsumers);
    StageSums<Shape> sums;
    part.consume(part.count_keys(), sums);
    part.send_part(sums);
  }
  sync_cluster();
  part.write_out();
}

}  // namespace nsa
