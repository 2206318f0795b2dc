#include "selected/sm90/launch_forward.cuh"

namespace nsa {
template void launch_selected_forward_sm90<Half, 128, 128>(const SelectedForwardParams&, const SelectedForwardPlan&,
                                                           cudaStream_t);
}  // namespace nsa
