#include "range/sm90/launch_forward.cuh"

namespace nsa {
template void launch_range_forward_sm90<BFloat16, 128, 128>(const RangeForwardParams&, cudaStream_t);
}  // namespace nsa
