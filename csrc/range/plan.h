// Which kernels attend over a range of keys, how many splits they make, and what workspace they take.
#pragma once

#include "common/plan.h"
#include "range/params.h"
#include "range/tiles.h"

namespace nsa {

struct RangeForwardPlan {
  KernelChoice kernel;
  bool takes_sum;  // whether the kernel writes params.sum, if there is one
  Launches launches;
};
RangeForwardPlan plan_range_forward(const RangeForwardParams& params, ElementType type, const Device& device);

// Into how many splits the rows that see a tile of keys are cut, so that all multiprocessors have work.
struct RangeSplits {
  int32_t splits;
  int32_t rows_per_split;
  int64_t partial_floats;  // that the sums of several splits take
};

struct RangeBackwardPlan {
  NeededGradients needed;
  KernelChoice query;  // the gradient of q
  KernelChoice keys;   // the gradients of k and v
  RangeSplits splits;
  Launches launches;
};
// `params` lacks what the plan says: the splits, and where their sums go.
RangeBackwardPlan plan_range_backward(const RangeBackwardParams& params, ElementType type, const Device& device,
                                      NeededGradients needed);

}  // namespace nsa
