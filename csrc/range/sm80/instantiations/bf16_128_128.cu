#include "range/sm80/launch.cuh"

namespace nsa {
template void launch_range_forward_sm80<BFloat16, 128, 128>(const RangeForwardParams&, cudaStream_t);
template void launch_range_backward_query_sm80<BFloat16, 128, 128>(const RangeBackwardParams&, cudaStream_t);
template void launch_range_backward_keys_sm80<BFloat16, 128, 128>(const RangeBackwardParams&, cudaStream_t);
}  // namespace nsa
