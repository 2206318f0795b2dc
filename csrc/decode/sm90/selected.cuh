// The second kernel of a step on Hopper: the choice of blocks of one query, attention to them, and the sum of the three
// branches. A cluster shares a query: each block of threads attends to some of the chosen blocks, and writes some of
// the output.
#pragma once

#include "decode/chain.cuh"
#include "decode/parts.cuh"
#include "decode/sm90/choice.cuh"
#include "decode/sm90/others.cuh"

namespace nsa {

// Attention to the chosen blocks.
template <typename Shape>
struct ChosenPart {
  using Element = typename Shape::Element;
  const DecodeParams& params;
  ChosenShared<Shape>& shared;
  const ChosenQuery& of;

  // The pages of the sequence, where they all have room.
  __device__ bool caches_pages() const { return params.selected.table_width <= decode_sm90::kCachedPages; }
  __device__ void cache_pages() const {
    if (caches_pages()) {
#pragma unroll 1
      for (int32_t i = static_cast<int32_t>(threadIdx.x); i < params.selected.table_width; i += Shape::kThreads) {
        shared.pages[i] = params.selected.table[of.unit.index * params.selected.table_stride + i];
      }
    }
  }

  // The part's keys: those of its blocks that the query sees.
  __device__ int32_t first_of_list() const { return of.block * params.part_blocks; }
  __device__ int32_t count_keys() const {
    const int32_t blocks = min(params.part_blocks, of.chosen - first_of_list());
    if (blocks <= 0) {
      return 0;
    }
    const int32_t past = (shared.list[first_of_list() + blocks - 1] + 1) * params.select_size - 1 - of.position;
    return blocks * params.select_size - max(past, 0);
  }
  __device__ RowOffsets locate(int32_t i) const {
    const PagedRows& keys = params.selected;
    const int32_t at = static_cast<int32_t>(params.by_select_size.divide(static_cast<uint32_t>(i)));
    const int32_t row = (shared.list[first_of_list() + at] - at) * params.select_size + i;
    const int32_t page = static_cast<int32_t>(keys.by_page.divide(static_cast<uint32_t>(row)));
    const int32_t number = caches_pages()
                               ? checked_page(params, keys, page < keys.table_width ? shared.pages[page] : -1)
                               : page_at(params, keys, of.unit.index, page);
    return row_of_page(keys, number, row - page * keys.rows_per_page);
  }

  __device__ void produce(int32_t count) const {
    const HeadPools<Element> pools(params.selected, of.unit.head);
    RingPlace<Shape::kStages> place;
#pragma unroll 1
    for (int32_t first = 0; first < count; first += Shape::kKeys) {
      const int32_t i = first + static_cast<int32_t>(threadIdx.x);
      fill_stage<Shape>(shared.ring, shared.barriers, place, pools, i < count ? locate(i) : nowhere());
      place.advance();
    }
  }

  __device__ void consume(int32_t count, StageSums<Shape>& sums) const {
    SeenKeys<Shape> seen;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      seen.low[r][0] = seen.low[r][1] = 0;
      seen.high[r][0] = seen.high[r][1] = count;
    }
    wait(&shared.queries_full, 0);
    const QueryOperands<Shape> queries(shared.queries);
    const StageConsumer<Shape> consumer{queries, {shared.weights}, shared.exchange, params.scale_log2};
    RingPlace<Shape::kStages> place;
#pragma unroll 1
    for (int32_t first = 0; first < count; first += Shape::kKeys) {
      consumer.attend(sums, shared.ring, shared.barriers, place, seen, first, first + Shape::kKeys, nullptr);
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
          const uint32_t to = shared_address(&shared.part_sums[of.block][row]);
#pragma unroll 1
          for (int32_t other = 0; other < params.cluster; ++other) {
            store_there(address_in(to, other), sums.highest[r][half], total);
          }
        }
#pragma unroll
        for (int c = 0; c < Shape::kColumns / 8; ++c) {
          const int32_t at = row * (Shape::kDimV / 4) + (column + 8 * c) / 4;
          const int32_t owner = at / of.share;
          store_there(
              address_in(parts + 16 * (of.block * of.share + at - owner * of.share) + 4 * ((column + 8 * c) % 4),
                         owner),
              sums.out[r][c][2 * half], sums.out[r][c][2 * half + 1]);
        }
      }
    }
  }

  // This block of threads' share of the output.
  __device__ void write_out() const {
    const int32_t fours = params.group * (Shape::kDimV / 4);
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < of.share && of.block * of.share + i < fours;
         i += Shape::kThreads) {
      const int32_t at = of.block * of.share + i;
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
        add_four(sum, weight, shared.parts[c * of.share + i]);
      }
      float4 out = shared.gated[i];
      add_four(out, total == 0.f ? 0.f : shared.gates[1][g] / total, sum);
      Element* const to =
          params.out.row<Element>(of.sequence.batch, of.sequence.first + of.query, of.unit.head * params.group + g);
      write_four(to + column, out, params.out.width - column);
    }
  }
};

// What the first kernel left: sums of the other branches joined, and this block of threads' blocks ranked. By all
// threads; consumers hold the first partial sums of the other branches.
template <typename Shape>
__device__ inline void rank_blocks(const Choice<Shape>& choice, const OtherBranches<Shape>& others, bool produces,
                                   float4 (&held)[kHeldParts]) {
  const DecodeParams& params = choice.params;
  const ChosenQuery& query = choice.of;
  others.copy_sums();
  choice.copy_highest();
  choice.copy_weights(choice.first_stage);
  commit_copies();
  if (produces) {
    others.read_gates();
  } else {
    const auto parts = others.parts_of(0);
    others.load(held, parts, parts.first);
  }
  wait_copies<0>();
  __syncthreads();
  if (produces) {
    fill_queries<Shape>(choice.shared.queries, params, query.sequence, query.unit.head, query.first_row(params),
                        query.first_row(params) + params.group);
    arrive_after_copies(&choice.shared.queries_full);
  } else {
    others.join();
  }
  __syncthreads();
  choice.make_factors();
  __syncthreads();
  choice.rank_blocks();
  __syncthreads();
}

// Clusters (cluster, unit, query). Empty unless it is compiled for sm_90a: see runs_on_this_device.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    decode_selected_sm90(const __grid_constant__ DecodeParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  ChosenShared<Shape>& shared = *reinterpret_cast<ChosenShared<Shape>*>(shared_bytes);
  const ChosenQuery query(params);
  if (query.query >= query.sequence.queries) {
    return;
  }
  arrive_at_cluster();  // all have begun: their shared memory is there
  const Choice<Shape> choice(params, shared, query);
  const OtherBranches<Shape> others{params, shared, query};
  const ChosenPart<Shape> part{params, shared, query};
  if (threadIdx.x == 0) {
    shared.barriers.init();
    init_barrier(&shared.queries_full, Shape::kProducers);
  }
  part.cache_pages();
  const bool produces = this_warp() < decode_sm90::kProducerWarps;
  float4 held[kHeldParts];
  wait_for_previous();
  rank_blocks(choice, others, produces, held);
  wait_for_cluster();
  choice.send_candidates();
  if (!produces) {
    others.add(held);
  }
  sync_cluster();
  if (produces) {
    if (this_warp() == 0) {
      if (query.chosen > 0) {
        choice.choose();
      }
      arrive_at_group(kListBarrier, 32 + Shape::kConsumers);
    }
    sync_producers<Shape>();
    part.produce(part.count_keys());
  } else {
    sync_group(kListBarrier, 32 + Shape::kConsumers);
    StageSums<Shape> sums;
    part.consume(part.count_keys(), sums);
    part.send_part(sums);
  }
  sync_cluster();
  part.write_out();
#endif
}

}  // namespace nsa
