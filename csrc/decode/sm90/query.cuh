// A query as a block of threads of its cluster sees it, and what they share.
#pragma once

#include "decode/sm90/cluster.cuh"
#include "decode/sm90/consumer.cuh"
#include "decode/sm90/highest.cuh"
#include "decode/sm90/schedule.cuh"

namespace nsa {

constexpr int kMostCluster = decode_sm90::kMostCluster;

__device__ inline void add_four(float4& sum, float weight, const float4& x) {
  sum.x = fmaf(weight, x.x, sum.x);
  sum.y = fmaf(weight, x.y, sum.y);
  sum.z = fmaf(weight, x.z, sum.z);
  sum.w = fmaf(weight, x.w, sum.w);
}

template <typename Shape>
struct ChosenShared {
  using Element = typename Shape::Element;
  static constexpr int kFours = Shape::kRows * Shape::kDimV / 4;
  Ring<Shape> ring;  // before it is filled: what the choice needs
  Element queries[Shape::QTile::kSize];
  Element weights[Shape::WeightTile::kSize];
  ConsumerExchange<Shape> exchange;
  float4 gated[kFours];                           // the other branches' sum, of this block of threads' share
  float4 parts[kFours + kMostCluster];            // (cluster, share)
  RowSums part_sums[kMostCluster][Shape::kRows];  // of all rows
  float4 adding[Shape::kConsumers];
  RowSums ranges[2][Shape::kRows];  // of the compressed branch and of the window, over all parts: 1 / sum
  float gates[3][Shape::kRows];
  int32_t pages[decode_sm90::kCachedPages];
  int32_t list[64];
  RingBarriers<Shape> barriers;
  Barrier queries_full;

  // The choice: candidates of all slices; what a warp takes of its slice; this block of threads' blocks; and what the
  // first kernel left of them, at offsets that DecodeParams has.
  __device__ Candidate* candidates() { return reinterpret_cast<Candidate*>(&ring); }
  __device__ Candidate* taken(int warp) { return candidates() + decode_sm90::kMostCandidates + 64 * warp; }
  __device__ Candidate* ranked() { return taken(Shape::kThreads / 32); }
  __device__ float* at(int32_t bytes) {
    return reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(&ring) + bytes);
  }
};

// All that follows from shapes and lengths alone, computed once. By whole warps.
struct ChosenQuery {
  int32_t unit_index;
  DecodeUnit unit;
  DecodeSequence sequence;
  int32_t query;
  int32_t block;  // of threads, in the cluster
  int32_t position;
  int32_t own_block;
  int32_t chosen;    // how many blocks are
  int32_t stages;    // of compressed keys that the sequence has
  Slots slots[2];    // of partial sums: compressed, window
  int32_t tile_row;  // of the query's first row, in its tile
  int32_t share;     // fours of the output for each block of threads

  __device__ explicit ChosenQuery(const DecodeParams& p)
      : unit_index(static_cast<int32_t>(blockIdx.y)),
        unit(decode_unit(p, unit_index)),
        sequence(decode_sequence(p, unit.index)),
        query(static_cast<int32_t>(blockIdx.z)),
        block(static_cast<int32_t>(blockIdx.x)),
        position(sequence.position(query)) {
    own_block = position < 0 ? -1 : static_cast<int32_t>(p.by_select_size.divide(static_cast<uint32_t>(position)));
    chosen = min(p.num_selected, own_block + 1);
    share = (p.group * p.columns / 4 + p.cluster - 1) / p.cluster;
    const StageTotals totals = count_all_stages(p, unit.index);
    const StageCounts counts = count_stages(p, unit.index);
    stages = counts.compressed;
    const int32_t tile = static_cast<int32_t>(p.by_tile_queries.divide(static_cast<uint32_t>(query)));
    tile_row = (query - tile * p.tile_queries) * p.group;
#pragma unroll
    for (int branch = 0; branch < 2; ++branch) {
      slots[branch] = find_slots(p, totals, counts, unit_index, unit.head, tile, branch == 0);
    }
  }
  __device__ int32_t first_row(const DecodeParams& p) const { return query * p.group; }
  // A row's place in the first of its partial sums of a branch; the next is tile_rows further.
  __device__ int64_t range_place(const DecodeParams& p, int branch) const {
    return static_cast<int64_t>(slots[branch].first) * p.tile_rows + tile_row;
  }
  __device__ int32_t parts() const { return slots[0].count + slots[1].count; }
};

}  // namespace nsa
