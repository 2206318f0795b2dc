// The kernels of this folder for Hopper, for fp16 heads of at most 64.
#include "selection/launch_sm90.cuh"

namespace nsa {
template bool try_select_blocks_sm90<Half, 64>(const SelectBlocksParams&, cudaStream_t);
}  // namespace nsa
