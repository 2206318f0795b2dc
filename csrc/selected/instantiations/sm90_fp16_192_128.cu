// The kernel of this folder for Hopper, for fp16 heads of at most 192 (keys) and 128 (values).
#include "selected/launch_sm90.cuh"

namespace nsa {
template bool try_selected_forward_sm90<Half, 192, 128>(const SelectedForwardParams&, cudaStream_t);
}  // namespace nsa
