// The kernels of this folder for Hopper, for bf16 heads of at most 64.
#include "selection/launch_sm90.cuh"

namespace nsa {
template bool try_select_blocks_sm90<BFloat16, 64>(const SelectBlocksParams&, cudaStream_t);
}  // namespace nsa
