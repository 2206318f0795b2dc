// Obeys the plan of the choice of blocks.
#include "common/dispatch.cuh"
#include "selection/cuda/kernels.h"
#include "selection/cuda/launch.h"

namespace nsa {

void launch_select_blocks(const SelectBlocksParams& params, const SelectBlocksPlan& plan, ElementType type,
                          cudaStream_t stream) {
  if (plan.kernel.machine == Machine::kPlain) {
    return launch_select_blocks_plain(params, stream);
  }
  with_kernel(plan.kernel.machine, type, params.q.width, 0, [&](auto on, auto element, auto dim, auto) {
    if constexpr (on == Machine::kSm90) {
      launch_select_blocks_sm90<decltype(element), dim>(params, plan, stream);
    } else {
      launch_select_blocks_sm80<decltype(element), dim>(params, stream);
    }
  });
}

}  // namespace nsa
