// The gradients of k and v of selected attention on Hopper, and that of q with the scores that they hand over, for fp16
// heads of at most 64 (keys) and 64 (values).
#include "selected/launch_handed_sm90.cuh"

namespace nsa {
template void launch_selected_backward_keys_sm90<Half, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
template SelectedBackwardPlan selected_backward_plan_sm90<Half, 64, 64>(const SelectedBackwardParams&);
template void launch_selected_backward_handed_sm90<Half, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
}  // namespace nsa
