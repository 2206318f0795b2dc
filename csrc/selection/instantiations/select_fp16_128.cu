// The kernels of this folder for fp16 heads of at most 128.
#include "selection/launch_sm80.cuh"

namespace nsa {
template void launch_select_blocks_sm80<Half, 128>(const SelectBlocksParams&, cudaStream_t);
}  // namespace nsa
