#include "selected/sm80/launch.cuh"

namespace nsa {
template void launch_selected_forward_sm80<BFloat16, 192, 128>(const SelectedForwardParams&, const KernelTile&,
                                                               cudaStream_t);
template void launch_selected_backward_query_sm80<BFloat16, 192, 128>(const SelectedBackwardParams&, const KernelTile&,
                                                                      cudaStream_t);
template void launch_selected_backward_keys_sm80<BFloat16, 192, 128>(const SelectedBackwardParams&, cudaStream_t);
}  // namespace nsa
