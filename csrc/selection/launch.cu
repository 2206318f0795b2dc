// Which instantiation runs.
#include "common/dispatch.h"
#include "selection/launch.h"
#include "selection/launch_sm80.cuh"
#include "selection/launch_sm90.cuh"

namespace nsa {

// Compiled in instantiations/.
extern template void launch_select_blocks_sm80<Half, 64>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<Half, 128>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<Half, 192>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<Half, 256>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<BFloat16, 64>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<BFloat16, 128>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<BFloat16, 192>(const SelectBlocksParams&, cudaStream_t);
extern template void launch_select_blocks_sm80<BFloat16, 256>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<Half, 64>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<Half, 128>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<Half, 192>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<BFloat16, 64>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<BFloat16, 128>(const SelectBlocksParams&, cudaStream_t);
extern template bool try_select_blocks_sm90<BFloat16, 192>(const SelectBlocksParams&, cudaStream_t);

namespace {

void check(bool supported, const char* what) {
  if (!supported) {
    throw std::runtime_error(std::string("nsa_torch: choice of blocks: there is no kernel for ") + what);
  }
}

template <typename Element, int kDim>
void launch_select_blocks_of(const SelectBlocksParams& params, cudaStream_t stream) {
  if constexpr (kDim <= 192) {
    if (try_select_blocks_sm90<Element, kDim>(params, stream)) {
      return;
    }
  }
  launch_select_blocks_sm80<Element, kDim>(params, stream);
}

}  // namespace

void launch_select_blocks(const SelectBlocksParams& params, ElementType type, cudaStream_t stream) {
  check(params.num_selected <= kMostSelected, "more than 64 selected blocks");
  check(params.block_size / params.block_stride <= kMostPieces, "block sizes of more than 64 strides");
  check(params.select_size / params.block_stride <= kMostPieces, "selection blocks of more than 64 strides");
  check(params.q.width <= kLargestHeadDim, "head dimensions above 256");
  if (type == ElementType::kFloat32) {
    launch_select_blocks_plain(params, stream);
    return;
  }
  check(params.sequences.group <= kMostHeads, "more than 256 heads of 16 bits a group");
  with_tile_dims(params.q.width, 0, [&](auto dim, auto) {
    if (type == ElementType::kFloat16) {
      launch_select_blocks_of<Half, dim>(params, stream);
    } else {
      launch_select_blocks_of<BFloat16, dim>(params, stream);
    }
  });
}

}  // namespace nsa
