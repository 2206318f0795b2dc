// Obeys the plan of attention over a range.
#include "common/dispatch.cuh"
#include "range/cuda/kernels.h"
#include "range/cuda/launch.h"

namespace nsa {

void launch_range_forward(const RangeForwardParams& params, const RangeForwardPlan& plan, ElementType type,
                          cudaStream_t stream) {
  if (plan.kernel.machine == Machine::kPlain) {
    return launch_range_forward_plain(params, stream);
  }
  with_kernel(plan.kernel.machine, type, params.q.width, params.v.width, [&](auto on, auto element, auto k, auto v) {
    if constexpr (on == Machine::kSm90) {
      launch_range_forward_sm90<decltype(element), k, v>(params, stream);
    } else {
      RangeSm80<decltype(element), k, v>::forward(params, stream);
    }
  });
}

void launch_range_backward(const RangeBackwardParams& params, const RangeBackwardPlan& plan, ElementType type,
                           cudaStream_t stream) {
  if (plan.keys.machine == Machine::kPlain) {
    return launch_range_backward_plain(params, plan.needed, stream);
  }
  if (plan.needed.query) {
    with_kernel(plan.query.machine, type, params.q.width, params.v.width, [&](auto on, auto element, auto k, auto v) {
      if constexpr (on == Machine::kSm90) {
        launch_range_backward_query_sm90<decltype(element), k, v>(params, stream);
      } else {
        RangeSm80<decltype(element), k, v>::backward_query(params, stream);
      }
    });
  }
  if (!plan.needed.keys) {
    return;
  }
  with_kernel(plan.keys.machine, type, params.q.width, params.v.width, [&](auto on, auto element, auto k, auto v) {
    if constexpr (on == Machine::kSm90) {
      launch_range_backward_keys_sm90<decltype(element), k, v>(params, stream);
    } else {
      RangeSm80<decltype(element), k, v>::backward_keys(params, stream);
    }
  });
}

}  // namespace nsa
