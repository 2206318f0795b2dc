// The kernels of this folder for fp16 heads of at most 128 (keys) and 128 (values).
#include "attention/launch_sm80.cuh"

namespace nsa {
template void launch_range_forward_sm80<Half, 128, 128>(const RangeForwardParams&, cudaStream_t);
template void launch_range_backward_query_sm80<Half, 128, 128>(const RangeBackwardParams&, cudaStream_t);
template void launch_range_backward_keys_sm80<Half, 128, 128>(const RangeBackwardParams&, cudaStream_t);
}  // namespace nsa
