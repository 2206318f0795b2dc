// Which kernels attend over a range of keys, how many splits they make, and what workspace they take.
#pragma once

#include "common/plan.h"
#include "range/params.h"

namespace nsa {

struct RangeForwardPlan {
  KernelChoice kernel;
  bool takes_sum;  // whether the kernel writes params.sum, if there is one
};
RangeForwardPlan plan_range_forward(const RangeForwardParams& params, ElementType type, const Device& device);

// Into how many splits the rows that see a tile of keys are cut, so that all multiprocessors have work.
struct RangeSplits {
  int32_t splits;
  int32_t rows_per_split;
  int64_t partial_floats;  // that the sums of several splits take
};

struct RangeBackwardPlan {
  KernelChoice query;  // the gradient of q
  KernelChoice keys;   // the gradients of k and v
  RangeSplits splits;
};
// `params` lacks what the plan says: the splits, and where their sums go.
RangeBackwardPlan plan_range_backward(const RangeBackwardParams& params, ElementType type, const Device& device);

// What the kernels for Hopper are made of; their shapes are held to it.
namespace range_sm90 {

constexpr int32_t kGroupRows = 64;             // of a warpgroup
constexpr int64_t kKeysPerGradientTile = 128;  // of a block of threads that sums gradients of keys
// Rows of a warpgroup that whole queries fill.
constexpr int32_t filled_rows(int32_t group) { return kGroupRows / group * group; }
// Rows of a step of the gradients of keys.
constexpr int32_t key_step_rows(int32_t tile_k) { return tile_k <= 128 ? 64 : 32; }
// Whether the forward kernel has room for the rows of the other branches.
constexpr bool takes_sum(int32_t tile_k) { return tile_k <= 128; }

}  // namespace range_sm90
}  // namespace nsa
