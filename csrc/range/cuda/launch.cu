// Obeys the plan of attention over a range.
#include "common/dispatch.cuh"
#include "range/cuda/launch.h"
#include "range/sm80/launch.h"
#include "range/sm90/launch.h"

namespace nsa {

void launch_range_forward(const RangeForwardParams& params, const RangeForwardPlan& plan, ElementType type,
                          cudaStream_t stream) {
  if (plan.kernel.machine == Machine::kPlain) {
    return launch_range_forward_plain(params, stream);
  }
  with_tiles(type, params.q.width, params.v.width, [&](auto element, auto k, auto v) {
    using Element = decltype(element);
    if constexpr (has_sm90_kernels(k)) {
      if (plan.kernel.machine == Machine::kSm90) {
        return launch_range_forward_sm90<Element, k, v>(params, stream);
      }
    }
    launch_range_forward_sm80<Element, k, v>(params, stream);
  });
}

void launch_range_backward(const RangeBackwardParams& params, const RangeBackwardPlan& plan, ElementType type,
                           cudaStream_t stream) {
  if (plan.keys.machine == Machine::kPlain) {
    return launch_range_backward_plain(params, stream);
  }
  with_tiles(type, params.q.width, params.v.width, [&](auto element, auto k, auto v) {
    using Element = decltype(element);
    bool query_done = false;
    bool keys_done = false;
    if constexpr (has_sm90_kernels(k)) {
      query_done = plan.query.machine == Machine::kSm90;
      keys_done = plan.keys.machine == Machine::kSm90;
      if (query_done) {
        launch_range_backward_query_sm90<Element, k, v>(params, stream);
      }
      if (keys_done) {
        launch_range_backward_keys_sm90<Element, k, v>(params, stream);
      }
    }
    if (!query_done) {
      launch_range_backward_query_sm80<Element, k, v>(params, stream);
    }
    if (!keys_done) {
      launch_range_backward_keys_sm80<Element, k, v>(params, stream);
    }
  });
}

}  // namespace nsa
