// The gradient of q on Hopper, for fp16 heads of at most 64 (keys) and 64 (values).
#include "attention/launch_query_sm90.cuh"

namespace nsa {
template bool try_range_backward_query_sm90<Half, 64, 64>(const RangeBackwardParams&, cudaStream_t);
}  // namespace nsa
