// The compressed branch and the window, as the second kernel adds them up: each block of threads of a cluster a share
// of the output.
#pragma once

#include "common/gates.cuh"
#include "decode/sm90/query.cuh"

namespace nsa {

constexpr int kHeldParts = 10;  // partial sums that a thread has under way

// Starts to copy two float32 numbers to shared memory.
__device__ inline void copy_pair(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

template <typename Shape>
struct OtherBranches {
  const DecodeParams& params;
  ChosenShared<Shape>& shared;
  const ChosenQuery& of;

  // Highest scores and sums, of both branches one after the other: (part, G).
  __device__ RowSums* range_sums() const { return reinterpret_cast<RowSums*>(shared.at(params.choice_sums)); }

  // Starts to copy them.
  __device__ void copy_sums() const {
    const int64_t places[2] = {of.range_place(params, 0),
                               of.range_place(params, 1) - static_cast<int64_t>(of.slots[0].count) * params.tile_rows};
#pragma unroll 2
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < of.parts() * params.group; i += Shape::kThreads) {
      const int32_t part = static_cast<int32_t>(params.by_group.divide(static_cast<uint32_t>(i)));
      const int32_t g = i - part * params.group;
      const int64_t place = part < of.slots[0].count ? places[0] : places[1];
      copy_pair(range_sums() + i, params.range_sums + place + part * params.tile_rows + g);
    }
  }

  __device__ void read_gates() const {
    const int32_t g = static_cast<int32_t>(threadIdx.x);
    if (g < params.group) {
      float gates[3];
      load_gates(gates, params.gates, of.sequence.batch, of.sequence.first + of.query, of.unit.head * params.group + g);
#pragma unroll
      for (int b = 0; b < 3; ++b) {
        shared.gates[b][g] = gates[b];
      }
    }
  }

  // Each row's highest score and the inverse of its sum over all parts, of both branches. By the consumers, eight for
  // each.
  __device__ void join() const {
    const int32_t lane = this_lane() % 8;
    const int32_t thread = static_cast<int32_t>(threadIdx.x) - Shape::kProducers;
#pragma unroll 1
    for (int32_t i = thread / 8; i < 2 * Shape::kRows; i += Shape::kConsumers / 8) {
      const int32_t branch = i / Shape::kRows;
      const int32_t g = i % Shape::kRows;
      const int32_t parts = g >= params.group ? 0 : branch == 0 ? of.slots[0].count : of.slots[1].count;
      const RowSums* const from = range_sums() + (branch == 0 ? 0 : of.slots[0].count) * params.group + g;
      float highest = kMinusInfinity;
#pragma unroll 4
      for (int32_t s = lane; s < parts; s += 8) {
        highest = fmaxf(highest, from[s * params.group].highest);
      }
#pragma unroll
      for (int step = 4; step > 0; step /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
      }
      const float offset = highest == kMinusInfinity ? 0.f : highest;
      float sum = 0.f;
#pragma unroll 4
      for (int32_t s = lane; s < parts; s += 8) {
        const RowSums x = from[s * params.group];
        sum = fmaf(x.sum, exp2_approx(x.highest - offset), sum);
      }
#pragma unroll
      for (int step = 4; step > 0; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
      }
      if (lane == 0) {
        shared.ranges[branch][g] = {highest, sum == 0.f ? 0.f : 1.f / sum};
      }
    }
  }

  // What a consumer adds up: a four of the output, of every `step`-th part from `first` on.
  struct Parts {
    int32_t at;  // below 0: none
    int32_t g;
    int32_t first;
    int32_t step;
  };
  // Of round `round`, where the share is more than the consumers.
  __device__ Parts parts_of(int32_t round) const {
    const int32_t thread = static_cast<int32_t>(threadIdx.x) - Shape::kProducers;
    const int32_t last = min(of.share, params.group * (Shape::kDimV / 4) - of.block * of.share);
    const int32_t groups = max(Shape::kConsumers / of.share, 1);
    const int32_t group = groups == 1 ? 0 : thread / of.share;
    const int32_t i = groups == 1 ? round * Shape::kConsumers + thread : thread - group * of.share;
    const int32_t at = group < groups && i < last ? of.block * of.share + i : -1;
    return {at, max(at, 0) / (Shape::kDimV / 4), group, groups};
  }

  __device__ void load(float4 (&x)[kHeldParts], const Parts& parts, int32_t first) const {
    const float* const begin =
        params.range_out + (of.range_place(params, 0) + parts.g) * Shape::kDimV + parts.at % (Shape::kDimV / 4) * 4;
    const int64_t to_window =
        (of.range_place(params, 1) - of.range_place(params, 0) - of.slots[0].count * params.tile_rows) * Shape::kDimV;
    const int32_t pitch = params.tile_rows * Shape::kDimV;
#pragma unroll
    for (int j = 0; j < kHeldParts; ++j) {
      const int32_t s = first + j * parts.step;
      x[j] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (parts.at >= 0 && s < of.parts()) {
        x[j] = __ldcg(
            reinterpret_cast<const float4*>(begin + s * pitch + (s < of.slots[0].count ? int64_t{0} : to_window)));
      }
    }
  }

  __device__ void add_held(float4& sum, const float4 (&x)[kHeldParts], const Parts& parts, int32_t first) const {
    const RowSums joined[2] = {shared.ranges[0][parts.g], shared.ranges[1][parts.g]};
    const float gates[2] = {shared.gates[0][parts.g] * joined[0].sum, shared.gates[2][parts.g] * joined[1].sum};
#pragma unroll
    for (int j = 0; j < kHeldParts; ++j) {
      const int32_t s = first + j * parts.step;
      if (s < of.parts()) {
        const bool compressed = s < of.slots[0].count;
        const float highest = range_sums()[s * params.group + parts.g].highest;
        const float offset = compressed ? joined[0].highest : joined[1].highest;
        const float weight =
            highest == kMinusInfinity ? 0.f : (compressed ? gates[0] : gates[1]) * exp2_approx(highest - offset);
        add_four(sum, weight, x[j]);
      }
    }
  }

  // The sum of this block of threads' share, whose first partial sums are held. By the consumers.
  __device__ void add(float4 (&held)[kHeldParts]) const {
    const int32_t thread = static_cast<int32_t>(threadIdx.x) - Shape::kProducers;
#pragma unroll 1
    for (int32_t round = 0; round == 0 || round * Shape::kConsumers < of.share; ++round) {
      const Parts parts = parts_of(round);
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
      for (int32_t first = parts.first; first < of.parts(); first += kHeldParts * parts.step) {
        if (round > 0 || first != parts.first) {
          load(held, parts, first);
        }
        add_held(sum, held, parts, first);
      }
      if (parts.step == 1) {
        if (parts.at >= 0) {
          shared.gated[parts.at - of.block * of.share] = sum;
        }
        continue;
      }
      shared.adding[thread] = sum;
      sync_consumers<Shape>();
      if (thread < of.share) {
#pragma unroll 1
        for (int32_t other = 1; other < parts.step; ++other) {
          add_four(sum, 1.f, shared.adding[other * of.share + thread]);
        }
        shared.gated[thread] = sum;
      }
    }
  }
};

}  // namespace nsa
