#include "selection/sm80/launch.cuh"

namespace nsa {
template void launch_select_blocks_sm80<BFloat16, 64>(const SelectBlocksParams&, cudaStream_t);
}  // namespace nsa
