// The gradient of q on Hopper, for bf16 heads of at most 192 (keys) and 128 (values).
#include "attention/launch_query_sm90.cuh"

namespace nsa {
template bool try_range_backward_query_sm90<BFloat16, 192, 128>(const RangeBackwardParams&, cudaStream_t);
}  // namespace nsa
