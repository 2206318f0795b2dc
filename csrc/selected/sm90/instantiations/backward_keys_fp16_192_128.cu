#include "selected/sm90/launch_handed.cuh"

namespace nsa {
template void launch_selected_backward_keys_sm90<Half, 192, 128>(const SelectedBackwardParams&,
                                                                 const SelectedBackwardPlan&, cudaStream_t);
template void launch_selected_backward_handed_sm90<Half, 192, 128>(const SelectedBackwardParams&,
                                                                   const SelectedBackwardPlan&, cudaStream_t);
}  // namespace nsa
