// The gradient of q for Hopper, for bf16 heads of at most 64 (keys) and 64 (values).
#include "selected/launch_query_sm90.cuh"

namespace nsa {
template bool try_selected_backward_query_sm90<BFloat16, 64, 64>(const SelectedBackwardParams&, cudaStream_t);
}  // namespace nsa
