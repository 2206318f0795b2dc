// The gradients of k and v over a range on Hopper, for fp16 heads of at most 128 (keys) and 128 (values).
#include "attention/launch_keys_sm90.cuh"

namespace nsa {
template bool range_backward_keys_runs_sm90<Half, 128, 128>(const RangeBackwardParams&);
template void launch_range_backward_keys_sm90<Half, 128, 128>(const RangeBackwardParams&, cudaStream_t);
}  // namespace nsa
