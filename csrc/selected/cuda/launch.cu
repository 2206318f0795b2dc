// Obeys the plan of attention over listed blocks.
#include "common/dispatch.cuh"
#include "selected/cuda/kernels.h"
#include "selected/cuda/launch.h"

namespace nsa {

void launch_selected_forward(const SelectedForwardParams& params, const SelectedForwardPlan& plan, ElementType type,
                             cudaStream_t stream) {
  if (plan.kernel.machine == Machine::kPlain) {
    return launch_selected_forward_plain(params, stream);
  }
  with_kernel(plan.kernel.machine, type, params.q.width, params.v.width, [&](auto on, auto element, auto k, auto v) {
    if constexpr (on == Machine::kSm90) {
      launch_selected_forward_sm90<decltype(element), k, v>(params, plan, stream);
    } else {
      SelectedSm80<decltype(element), k, v>::forward(params, plan.tile, stream);
    }
  });
}

void launch_selected_backward(const SelectedBackwardParams& params, const SelectedBackwardPlan& plan, ElementType type,
                              cudaStream_t stream) {
  if (plan.keys.machine == Machine::kPlain) {
    return launch_selected_backward_plain(params, plan.needed, stream);
  }
  if (plan.needed.query && plan.handed_heads == 0) {
    with_kernel(plan.query.machine, type, params.q.width, params.v.width, [&](auto on, auto element, auto k, auto v) {
      if constexpr (on == Machine::kSm90) {
        launch_selected_backward_query_sm90<decltype(element), k, v>(params, plan, stream);
      } else {
        SelectedSm80<decltype(element), k, v>::backward_query(params, plan.query_tile, stream);
      }
    });
  }
  if (!plan.needed.keys) {
    return;
  }
  with_kernel(plan.keys.machine, type, params.q.width, params.v.width, [&](auto on, auto element, auto k, auto v) {
    if constexpr (on == Machine::kSm90) {
      launch_selected_backward_keys_sm90<decltype(element), k, v>(params, plan, stream);
    } else {
      SelectedSm80<decltype(element), k, v>::backward_keys(params, stream);
    }
  });
}

}  // namespace nsa
