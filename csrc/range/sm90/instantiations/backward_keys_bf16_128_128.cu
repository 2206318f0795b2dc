#include "range/sm90/launch_backward_keys.cuh"

namespace nsa {
template void launch_range_backward_keys_sm90<BFloat16, 128, 128>(const RangeBackwardParams&, cudaStream_t);
}  // namespace nsa
