#include "selected/sm90/launch_handed.cuh"

namespace nsa {
template void launch_selected_backward_keys_sm90<BFloat16, 64, 64>(const SelectedBackwardParams&,
                                                                   const SelectedBackwardPlan&, cudaStream_t);
template void launch_selected_backward_handed_sm90<BFloat16, 64, 64>(const SelectedBackwardParams&,
                                                                     const SelectedBackwardPlan&, cudaStream_t);
}  // namespace nsa
