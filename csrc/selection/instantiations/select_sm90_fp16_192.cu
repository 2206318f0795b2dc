// The kernels of this folder for Hopper, for fp16 heads of at most 192.
#include "selection/launch_sm90.cuh"

namespace nsa {
template bool try_select_blocks_sm90<Half, 192>(const SelectBlocksParams&, cudaStream_t);
}  // namespace nsa
