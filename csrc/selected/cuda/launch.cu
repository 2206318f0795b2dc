// Obeys the plan of attention over listed blocks.
#include "common/dispatch.cuh"
#include "selected/cuda/launch.h"
#include "selected/sm80/launch.h"
#include "selected/sm90/launch.h"

namespace nsa {

void launch_selected_forward(const SelectedForwardParams& params, const SelectedForwardPlan& plan, ElementType type,
                             cudaStream_t stream) {
  if (plan.kernel.machine == Machine::kPlain) {
    return launch_selected_forward_plain(params, stream);
  }
  with_tiles(type, params.q.width, params.v.width, [&](auto element, auto k, auto v) {
    using Element = decltype(element);
    if constexpr (has_sm90_kernels(k)) {
      if (plan.kernel.machine == Machine::kSm90) {
        return launch_selected_forward_sm90<Element, k, v>(params, plan, stream);
      }
    }
    launch_selected_forward_sm80<Element, k, v>(params, stream);
  });
}

void launch_selected_backward(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan, ElementType type,
                              cudaStream_t stream) {
  if (plan.keys.machine == Machine::kPlain) {
    return launch_selected_backward_plain(params, stream);
  }
  with_tiles(type, params.q.width, params.v.width, [&](auto element, auto k, auto v) {
    using Element = decltype(element);
    bool query_done = false;
    bool keys_done = false;
    if constexpr (has_sm90_kernels(k)) {
      if (plan.handed_heads > 0) {
        return launch_selected_backward_handed_sm90<Element, k, v>(params, plan, stream);
      }
      query_done = plan.query.machine == Machine::kSm90;
      keys_done = plan.keys.machine == Machine::kSm90;
      if (query_done) {
        launch_selected_backward_query_sm90<Element, k, v>(params, plan, stream);
      }
      if (keys_done) {
        launch_selected_backward_keys_sm90<Element, k, v>(params, plan, stream);
      }
    }
    if (!query_done) {
      launch_selected_backward_query_sm80<Element, k, v>(params, stream);
    }
    if (!keys_done) {
      launch_selected_backward_keys_sm80<Element, k, v>(params, stream);
    }
  });
}

}  // namespace nsa
