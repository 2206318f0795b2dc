// The kernel of this folder for Hopper, for bf16 heads of at most 64 (keys) and 64 (values).
#include "selected/launch_sm90.cuh"

namespace nsa {
template bool try_selected_forward_sm90<BFloat16, 64, 64>(const SelectedForwardParams&, cudaStream_t);
}  // namespace nsa
