// The gradient of q for Hopper, for bf16 heads of at most 128 (keys) and 128 (values).
#include "selected/launch_query_sm90.cuh"

namespace nsa {
template bool try_selected_backward_query_sm90<BFloat16, 128, 128>(const SelectedBackwardParams&, cudaStream_t);
}  // namespace nsa
