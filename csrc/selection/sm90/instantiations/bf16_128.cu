#include "selection/sm90/launch.cuh"

namespace nsa {
template void launch_select_blocks_sm90<BFloat16, 128>(const SelectBlocksParams&, const SelectBlocksPlan&,
                                                       cudaStream_t);
}  // namespace nsa
