// The gradients of k and v over a range on Hopper, for bf16 heads of at most 64 (keys) and 64 (values).
#include "attention/launch_keys_sm90.cuh"

namespace nsa {
template bool range_backward_keys_runs_sm90<BFloat16, 64, 64>(const RangeBackwardParams&);
template void launch_range_backward_keys_sm90<BFloat16, 64, 64>(const RangeBackwardParams&, cudaStream_t);
}  // namespace nsa
