// The kernels of this folder for bf16 heads of at most 64.
#include "selection/launch_sm80.cuh"

namespace nsa {
template void launch_select_blocks_sm80<BFloat16, 64>(const SelectBlocksParams&, cudaStream_t);
}  // namespace nsa
