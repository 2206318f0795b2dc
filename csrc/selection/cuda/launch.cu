// Obeys the plan of the choice of blocks.
#include "common/dispatch.cuh"
#include "selection/cuda/launch.h"
#include "selection/sm80/launch.h"
#include "selection/sm90/launch.h"

namespace nsa {

void launch_select_blocks(const SelectBlocksParams& params, const SelectBlocksPlan& plan, ElementType type,
                          cudaStream_t stream) {
  if (plan.kernel.machine == Machine::kPlain) {
    return launch_select_blocks_plain(params, stream);
  }
  with_tiles(type, params.q.width, 0, [&](auto element, auto dim, auto) {
    using Element = decltype(element);
    if constexpr (has_sm90_kernels(dim)) {
      if (plan.kernel.machine == Machine::kSm90) {
        return launch_select_blocks_sm90<Element, dim>(params, plan, stream);
      }
    }
    launch_select_blocks_sm80<Element, dim>(params, stream);
  });
}

}  // namespace nsa
