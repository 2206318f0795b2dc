// The gradients of k and v of selected attention on Hopper, and that of q with the scores that they hand over, for fp16
// heads of at most 192 (keys) and 128 (values).
#include "selected/launch_handed_sm90.cuh"

namespace nsa {
template void launch_selected_backward_keys_sm90<Half, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
template SelectedBackwardPlan selected_backward_plan_sm90<Half, 192, 128>(const SelectedBackwardParams&);
template void launch_selected_backward_handed_sm90<Half, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
}  // namespace nsa
