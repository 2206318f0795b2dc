// The second kernel of a step: the choice of blocks, and the sums of the compressed and the window branch.
#pragma once

#include "common/gates.cuh"
#include "common/threads.cuh"
#include "decode/chain.cuh"
#include "decode/ranges.cuh"
#include "decode/ranks.cuh"
#include "decode/tiles.h"

namespace nsa {

using decode_tiles::kChooseThreads;
using decode_tiles::kChooseWarps;

// The highest of a branch's splits and the sum relative to it, of one row, by a warp.
static __device__ __noinline__ RowSums join_splits(const RowSums* of_row, int32_t splits, int32_t step) {
  RowSums joined{kMinusInfinity, 0.f};
#pragma unroll 1
  for (int32_t s = this_lane(); s < splits; s += 32) {
    const RowSums x = of_row[static_cast<int64_t>(s) * step];
    const float highest = fmaxf(joined.highest, x.highest);
    if (highest != kMinusInfinity) {
      joined.sum = joined.sum * exp2_approx(joined.highest - highest) + x.sum * exp2_approx(x.highest - highest);
    }
    joined.highest = highest;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, joined.highest, lane);
    const float sum = __shfl_xor_sync(0xffffffffu, joined.sum, lane);
    const float highest = fmaxf(joined.highest, other);
    if (highest != kMinusInfinity) {
      joined.sum = joined.sum * exp2_approx(joined.highest - highest) + sum * exp2_approx(other - highest);
    }
    joined.highest = highest;
  }
  return joined;
}

constexpr int kMostColumns = decode_tiles::kMostColumns / 128;

__device__ inline void add_weighted(float4& total, float weight, const float4& x) {
  total.x = fmaf(weight, x.x, total.x);
  total.y = fmaf(weight, x.y, total.y);
  total.z = fmaf(weight, x.z, total.z);
  total.w = fmaf(weight, x.w, total.w);
}

// A row's splits `first`, `first + step`, ... of both branches, added up with their gates: columns 128 c + 4 lane. By a
// warp.
__device__ inline void sum_splits(float4 (&total)[kMostColumns], const DecodeParams& params, int32_t unit,
                                  const float (&gates)[3], int32_t row, int32_t first_split, int32_t split_step) {
  const int64_t place = static_cast<int64_t>(unit) * params.all_splits() * params.rows() + row;
  const RowSums* const sums = params.range_sums + place;
  const float* const outs = params.range_out + place * params.columns;
  const int64_t step = static_cast<int64_t>(params.rows()) * params.columns;
  const RowSums compressed = join_splits(sums, params.splits, params.rows());
  const RowSums windowed =
      join_splits(sums + static_cast<int64_t>(params.splits) * params.rows(), params.window_splits, params.rows());
  const float factors[2] = {compressed.sum > 0.f ? gates[0] / compressed.sum : 0.f,
                            windowed.sum > 0.f ? gates[2] / windowed.sum : 0.f};
#pragma unroll 4
  for (int32_t s = first_split; s < params.all_splits(); s += split_step) {
    const bool first = s < params.splits;
    const float highest = sums[static_cast<int64_t>(s) * params.rows()].highest;
    if (highest == kMinusInfinity) {
      continue;  // its output was not written
    }
    const float weight = factors[first ? 0 : 1] * exp2_approx(highest - (first ? compressed : windowed).highest);
#pragma unroll
    for (int c = 0; c < kMostColumns; ++c) {
      const int32_t column = 128 * c + 4 * this_lane();
      if (column < params.columns) {
        add_weighted(total[c], weight, *reinterpret_cast<const float4*>(outs + s * step + column));
      }
    }
  }
}

// Adds up the splits of both branches, with their gates, for rows [first_row, first_row + kChooseWarps / warps): each
// by `warps` warps.
__device__ inline void add_splits(const DecodeParams& params, int32_t unit, const DecodeSequence& sequence,
                                  int32_t head, int32_t first_row, int32_t warps, float4* shared) {
  const int32_t row = first_row + this_warp() / warps;
  const int32_t part = this_warp() % warps;
  const bool there = row < sequence.queries * params.group;
  float4 total[kMostColumns] = {};
  if (there) {
    const int32_t query = static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(row)));
    float gates[3];
    load_gates(gates, params.gates, sequence.batch, sequence.first + query,
               head * params.group + row - query * params.group);
    sum_splits(total, params, unit, gates, row, part, warps);
  }
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c) {
    shared[(kMostColumns * this_warp() + c) * 32 + this_lane()] = total[c];
  }
  __syncthreads();
#pragma unroll 1
  for (int32_t c = part; there && c < kMostColumns; c += warps) {
    const int32_t column = 128 * c + 4 * this_lane();
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int32_t w = this_warp() - part; w < this_warp() - part + warps; ++w) {
      add_weighted(sum, 1.f, shared[(kMostColumns * w + c) * 32 + this_lane()]);
    }
    if (column < params.columns) {
      const int64_t place = static_cast<int64_t>(unit) * params.rows() + row;
      *reinterpret_cast<float4*>(params.gated + place * params.columns + column) = sum;
    }
  }
}

struct Selector {
  uint32_t counters[256];
  uint32_t prefix;
  int32_t higher;
  int32_t done;
};

// Adds to the counters how many ranks have each digit, of those that share the prefix above it.
__device__ inline void count_digits(Selector& selector, const uint32_t* ranks, int32_t count, int shift) {
  const uint32_t prefix = selector.prefix;
#pragma unroll 1
  for (int32_t first = 0; first < count; first += kChooseThreads) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x);
    const uint32_t rank = i < count ? ranks[i] : 0u;
    const bool mine = i < count && (shift == 24 || (rank ^ prefix) >> (shift + 8) == 0u);
    const uint32_t digit = mine ? (rank >> shift) & 255u : 256u;
    const unsigned same = __match_any_sync(0xffffffffu, digit);
    if (mine && __ffs(static_cast<int>(same)) - 1 == this_lane()) {
      atomicAdd(&selector.counters[digit], static_cast<uint32_t>(__popc(same)));
    }
  }
}

// The digit that the n-th highest rank has. By one warp: lane i holds digits 255 - 8 i and the seven below.
__device__ inline void find_digit(Selector& selector, int32_t n, int shift) {
  const int lane = this_lane();
  int32_t counts[8];
  int32_t sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    counts[j] = static_cast<int32_t>(selector.counters[255 - 8 * lane - j]);
    sum += counts[j];
  }
  int32_t above = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, above, step);
    above += lane >= step ? other : 0;
  }
  above += selector.higher - sum;  // ranks in higher digits
  __syncwarp();
  if (above < n && above + sum >= n) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (above < n && above + counts[j] >= n) {
        selector.prefix |= static_cast<uint32_t>(255 - 8 * lane - j) << shift;
        selector.higher = above;
        selector.done = above + counts[j] == n;
      }
      above += counts[j];
    }
  }
}

// The n-th highest of `count` ranks, or the part of it that tells, with how many are higher in selector.higher: ranks
// of that part or above are the n highest where selector.done. Digits of eight bits from the top.
__device__ inline void find_nth(Selector& selector, const uint32_t* ranks, int32_t count, int32_t n) {
  if (threadIdx.x == 0) {
    selector.prefix = 0u;
    selector.higher = 0;
  }
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) {
      selector.counters[threadIdx.x] = 0u;
    }
    __syncthreads();
    count_digits(selector, ranks, count, shift);
    __syncthreads();
    if (this_warp() == 0) {
      find_digit(selector, n, shift);
    }
    __syncthreads();
    if (selector.done) {
      break;
    }
  }
}

// The choice of one query.
struct Chooser {
  const DecodeParams& params;
  int32_t unit;
  int32_t index;  // of the sequence
  int32_t query;
  int32_t own_block;
  int32_t* list;

  // Each head's factors of its splits' weights, which make them probabilities: (G, splits).
  __device__ void read_factors(float* factors) const {
#pragma unroll 1
    for (int32_t g = this_warp(); g < params.group; g += kChooseWarps) {
      const RowSums* const of_row = params.range_sums +
                                    static_cast<int64_t>(unit) * params.all_splits() * params.rows() +
                                    query * params.group + g;
      const RowSums joined = join_splits(of_row, params.splits, params.rows());
#pragma unroll 1
      for (int32_t s = this_lane(); s < params.splits; s += 32) {
        const float highest = of_row[static_cast<int64_t>(s) * params.rows()].highest;
        factors[g * params.splits + s] =
            highest == kMinusInfinity ? 0.f : exp2_approx(highest - joined.highest) / joined.sum;
      }
    }
  }

  // Weight number `at` of split `split`, as a probability, summed over the group.
  __device__ float sum_heads(const float* factors, int32_t split, int32_t at) const {
    const int64_t step = static_cast<int64_t>(params.splits) * params.weights_of_split();
    const float* const from = params.weights +
                              (static_cast<int64_t>(unit) * params.rows() + query * params.group) * step +
                              static_cast<int64_t>(split) * params.weights_of_split() + at;
    float sum = 0.f;
#pragma unroll 8
    for (int32_t g = 0; g < params.group; ++g) {
      sum = fmaf(factors[g * params.splits + split], from[g * step], sum);
    }
    return sum;
  }

  __device__ void rank_blocks(const float* factors, uint32_t* ranks) const {
    float* const importance = reinterpret_cast<float*>(ranks);
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
#pragma unroll 1
    for (int32_t block = thread; block <= own_block; block += kChooseThreads) {
      const int32_t split = static_cast<int32_t>(params.by_split_blocks.divide(static_cast<uint32_t>(block)));
      importance[block] = sum_heads(factors, split, block - split * params.split_blocks);
    }
    __syncthreads();
    // What the last keys of a split give to the first blocks of the next one.
#pragma unroll 1
    for (int32_t i = thread; i < (params.splits - 1) * params.spill_blocks; i += kChooseThreads) {
      const int32_t split = i / params.spill_blocks;
      const int32_t at = params.split_blocks + i - split * params.spill_blocks;
      const int32_t block = split * params.split_blocks + at;
      if (block <= own_block) {
        importance[block] += sum_heads(factors, split, at);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t block = thread; block <= own_block; block += kChooseThreads) {
      ranks[block] = rank_of(params.forced, block, own_block, importance[block]);
    }
  }

  __device__ void write(int32_t at, int32_t block) const {
    const PagedRows& keys = params.selected;
    list[at] = block;
    params.block_pages[list - params.block_indices + at] =
        page_at(params, keys, index,
                static_cast<int32_t>(keys.by_page.divide(static_cast<uint32_t>(block * params.select_size))));
  }

  // The n highest, in ascending order: those from `least` on, and the first `ties` of those one below it.
  __device__ void write_list(const uint32_t* ranks, uint32_t least, int32_t ties,
                             int32_t (&before)[kChooseWarps][2]) const {
    int32_t place = 0;
    int32_t equal = 0;
#pragma unroll 1
    for (int32_t first = 0; first <= own_block; first += kChooseThreads) {
      const int32_t block = first + static_cast<int32_t>(threadIdx.x);
      const uint32_t rank = block <= own_block ? ranks[block] : 0u;
      const bool above = block <= own_block && rank >= least;
      const bool tied = ties > 0 && block <= own_block && rank == least - 1u;
      const unsigned aboves = __ballot_sync(0xffffffffu, above);
      const unsigned equals = __ballot_sync(0xffffffffu, tied);
      if (this_lane() == 0) {
        before[this_warp()][0] = __popc(aboves);
        before[this_warp()][1] = __popc(equals);
      }
      __syncthreads();
      const unsigned lower = (1u << this_lane()) - 1u;
      int32_t above_before = place + __popc(aboves & lower);
      int32_t equal_before = equal + __popc(equals & lower);
#pragma unroll 1
      for (int w = 0; w < kChooseWarps; ++w) {
        above_before += w < this_warp() ? before[w][0] : 0;
        equal_before += w < this_warp() ? before[w][1] : 0;
        place += before[w][0];
        equal += before[w][1];
      }
      if (above || (tied && equal_before < ties)) {
        write(above_before + min(equal_before, ties), block);
      }
      __syncthreads();
    }
  }
};

// The list of one query, ascending, -1 last.
__device__ inline void choose_blocks(const DecodeParams& params, int32_t unit, int32_t index,
                                     const DecodeSequence& sequence, int32_t query, unsigned char* shared) {
  __shared__ Selector selector;
  __shared__ int32_t before[kChooseWarps][2];
  int32_t* const list =
      params.block_indices + (static_cast<int64_t>(unit) * params.queries + query) * params.num_selected;
  const int32_t position = query < sequence.queries ? sequence.position(query) : -1;
  const int32_t own_block =
      position < 0 ? -1 : static_cast<int32_t>(params.by_select_size.divide(static_cast<uint32_t>(position)));
  const int32_t n = min(params.num_selected, own_block + 1);
  if (n > 0) {
    const Chooser chooser{params, unit, index, query, own_block, list};
    float* const factors = reinterpret_cast<float*>(shared);
    uint32_t* const ranks = reinterpret_cast<uint32_t*>(factors + params.group * params.splits);
    chooser.read_factors(factors);
    __syncthreads();
    chooser.rank_blocks(factors, ranks);
    find_nth(selector, ranks, own_block + 1, n);
    // Where all that share the threshold's digits are wanted, there are no ties to decide.
    const bool all = selector.done != 0;
    chooser.write_list(ranks, selector.prefix + (all ? 0u : 1u), all ? 0 : n - selector.higher, before);
  }
#pragma unroll 1
  for (int32_t i = n + static_cast<int32_t>(threadIdx.x); i < params.num_selected; i += kChooseThreads) {
    list[i] = -1;
  }
}

// Blocks of threads (x, unit): x < Tq choose for a query, the others add up the splits of some rows.
static __global__ void __launch_bounds__(kChooseThreads) decode_choose(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int32_t unit = static_cast<int32_t>(blockIdx.y);
  const auto [index, head] = decode_unit(params, unit);
  const DecodeSequence sequence = decode_sequence(params, index);
  start_next();
  wait_for_previous();
  const int32_t x = static_cast<int32_t>(blockIdx.x);
  if (x < params.queries) {
    choose_blocks(params, unit, index, sequence, x, shared);
    return;
  }
  add_splits(params, unit, sequence, head, (x - params.queries) * (kChooseWarps / params.adding_warps),
             params.adding_warps, reinterpret_cast<float4*>(shared));
}

}  // namespace nsa
