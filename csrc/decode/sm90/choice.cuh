// The choice of one query's blocks: each block of threads of its cluster ranks some of the blocks and offers the
// highest of them to all, and all choose from what was offered.
#pragma once

#include "decode/sm90/query.cuh"

namespace nsa {

template <typename Shape>
struct Choice {
  const DecodeParams& params;
  ChosenShared<Shape>& shared;
  const ChosenQuery& of;
  int32_t begin;  // blocks that this block of threads ranks
  int32_t end;
  int32_t first_stage;  // stages that weigh in them: from the one before the first block's on
  int32_t end_stage;

  __device__ Choice(const DecodeParams& p, ChosenShared<Shape>& s, const ChosenQuery& q) : params(p), shared(s), of(q) {
    const int32_t blocks = of.own_block + 1;
    const int32_t each = (blocks + p.cluster - 1) / p.cluster;
    begin = min(of.block * each, blocks);
    end = min(begin + each, blocks);
    first_stage = max(stage_of(begin) - 1, 0);
    end_stage = begin < end ? min(stage_of(end - 1) + 1, of.stages) : 0;
  }
  __device__ int32_t stage_of(int32_t selection_block) const {
    return static_cast<int32_t>(params.by_stage_blocks.divide(static_cast<uint32_t>(selection_block)));
  }

  // Starts to copy `rows` rows of the query's heads, from row `first` of an array (rows, Tq, padded_group) on.
  __device__ void copy_heads(float* to, const float* from, int32_t first, int32_t rows) const {
    const int32_t fours = params.padded_group / 4;
    const int32_t pitch = params.padded_rows();
    const float* const start = from + static_cast<int64_t>(first) * pitch + of.query * params.padded_group;
#pragma unroll 4
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < rows * fours; i += Shape::kThreads) {
      const int32_t row = static_cast<int32_t>(params.by_fours.divide(static_cast<uint32_t>(i)));
      copy_async(to + 4 * i, start + row * pitch + 4 * (i - row * fours), true);
    }
  }
  __device__ void copy_highest() const {
    copy_heads(shared.at(params.choice_factors), params.stage_highest, of.unit_index * params.stages + first_stage,
               end_stage - first_stage);
  }
  // Weights of stages [stage, stage + choice_stages) of these.
  __device__ void copy_weights(int32_t stage) const {
    const int32_t stages = min(params.choice_stages, end_stage - stage);
    copy_heads(shared.at(params.choice_weights), params.stage_weights,
               (of.unit_index * params.stages + stage) * params.weights_of_stage(), stages * params.weights_of_stage());
  }

  // Highest scores of stages become what makes their weights probabilities.
  __device__ void make_factors() const {
    float* const factors = shared.at(params.choice_factors);
    const int32_t numbers = (end_stage - first_stage) * params.padded_group;
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < numbers; i += Shape::kThreads) {
      const int32_t row = static_cast<int32_t>(params.by_fours.divide(static_cast<uint32_t>(i / 4)));
      const int32_t g = i - row * params.padded_group;
      const float highest = factors[i];
      const RowSums joined = shared.ranges[0][min(g, Shape::kRows - 1)];
      factors[i] =
          g >= params.group || highest == kMinusInfinity ? 0.f : exp2_approx(highest - joined.highest) * joined.sum;
    }
  }

  // Ranks the blocks of one stage, whose weights are in the buffer from stage `first` on. By a warp, of which
  // 2^log_lanes neighbouring lanes have four heads each of a block.
  __device__ void rank_stage(int32_t stage, int32_t first, int log_lanes) const {
    const int32_t lane = this_lane() & ((1 << log_lanes) - 1);
    const bool used = 4 * lane < params.padded_group;
    const int32_t column = used ? 4 * lane : 0;
    const int32_t pitch = params.padded_group;
    const float* const factors = shared.at(params.choice_factors) + (stage - first_stage) * pitch + column;
    const float* const weights =
        shared.at(params.choice_weights) + (stage - first) * params.weights_of_stage() * pitch + column;
    const float4 zeros = make_float4(0.f, 0.f, 0.f, 0.f);
    const float4 own = used && stage < end_stage ? *reinterpret_cast<const float4*>(factors) : zeros;
    const float4 before = used && stage > first ? *reinterpret_cast<const float4*>(factors - pitch) : zeros;
    Candidate* const to = shared.ranked() - begin;
    const int32_t first_block = stage * params.stage_blocks;
    const int32_t step = 32 >> log_lanes;
#pragma unroll 4
    for (int32_t at = this_lane() >> log_lanes; at < round_up_to(params.stage_blocks, step); at += step) {
      const int32_t b = first_block + at;
      float sum = 0.f;
      if (at < params.stage_blocks && stage < end_stage) {
        sum = weigh_heads(*reinterpret_cast<const float4*>(weights + at * pitch), own);
      }
      if (at < params.spill_blocks && stage > first) {  // the last keys of the stage before reach into it
        sum += weigh_heads(*reinterpret_cast<const float4*>(weights + (at - params.spill_blocks) * pitch), before);
      }
      for (int other = 1; other < 1 << log_lanes; other *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, other);
      }
      if (lane == 0 && at < params.stage_blocks && b >= begin && b < end) {
        to[b] = {rank_of(params.forced, b, of.own_block, sum), b};
      }
    }
  }
  __device__ static int32_t round_up_to(int32_t x, int32_t step) { return (x + step - 1) & -step; }
  __device__ static float weigh_heads(const float4& weights, const float4& factors) {
    return weights.x * factors.x + weights.y * factors.y + weights.z * factors.z + weights.w * factors.w;
  }

  // By all threads, once factors and the first weights are there.
  __device__ void rank_blocks() const {
    const int32_t fours = params.padded_group / 4;
    const int log_lanes = fours <= 1 ? 0 : fours <= 2 ? 1 : fours <= 4 ? 2 : 3;
    const int32_t last = end > begin ? stage_of(end - 1) : -1;
    int32_t stage = stage_of(begin);
#pragma unroll 1
    for (int32_t first = first_stage; stage <= last;) {
      const int32_t held = min(last + 1, first + params.choice_stages);
#pragma unroll 1
      for (int32_t s = stage + this_warp(); s < held; s += Shape::kThreads / 32) {
        rank_stage(s, first, log_lanes);
      }
      stage = held;
      if (stage > last) {
        return;
      }
      // The last stage that is there may reach into the next: it is read again.
      first = held - 1;
      __syncthreads();
      copy_weights(first);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
    }
  }

  // The highest of each slice of these blocks, by a warp for each, to all blocks of threads of the cluster.
  __device__ void send_candidates() const {
    const int32_t each = (end - begin + params.slices - 1) / params.slices;
    Candidate* const taken = shared.taken(this_warp());
#pragma unroll 1
    for (int32_t slice = this_warp(); slice < params.slices; slice += Shape::kThreads / 32) {
      const int32_t first = min(slice * each, end - begin);
      const int32_t found =
          take_highest(shared.ranked() + first, min(each, end - begin - first), params.num_selected, taken);
      const uint32_t to =
          shared_address(shared.candidates() + (of.block * params.slices + slice) * params.num_selected);
#pragma unroll 1
      for (int32_t i = this_lane(); i < params.num_selected; i += 32) {
        const Candidate x = i < found ? taken[i] : Candidate{0u, -1};
#pragma unroll 4
        for (int32_t other = 0; other < params.cluster; ++other) {
          store_there(address_in(to + static_cast<uint32_t>(sizeof(Candidate)) * i, other), __uint_as_float(x.rank),
                      __int_as_float(x.block));
        }
      }
      __syncwarp();
    }
  }

  // The highest of all candidates: the choice, by one warp.
  __device__ void choose() const {
    Candidate* const taken = shared.taken(this_warp());
    const int32_t found = take_highest(shared.candidates(), params.cluster * params.slices * params.num_selected,
                                       params.num_selected, taken);
#pragma unroll 1
    for (int32_t i = this_lane(); i < found; i += 32) {
      shared.list[i] = taken[i].block;
    }
  }
};

}  // namespace nsa
