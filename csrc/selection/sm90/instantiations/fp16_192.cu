#include "selection/sm90/launch.cuh"

namespace nsa {
template void launch_select_blocks_sm90<Half, 192>(const SelectBlocksParams&, const SelectBlocksPlan&, cudaStream_t);
}  // namespace nsa
