#include "selected/sm90/launch_backward_query.cuh"

namespace nsa {
template void launch_selected_backward_query_sm90<BFloat16, 64, 64>(const SelectedBackwardParams&,
                                                                    const SelectedBackwardPlan&, cudaStream_t);
}  // namespace nsa
