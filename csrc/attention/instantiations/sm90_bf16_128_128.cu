// The kernels of this folder for Hopper, for bf16 heads of at most 128 (keys) and 128 (values).
#include "attention/launch_sm90.cuh"

namespace nsa {
template bool try_range_forward_sm90<BFloat16, 128, 128>(const RangeForwardParams&, cudaStream_t);
}  // namespace nsa
