// Which kernel runs.
#include "selection/launch.h"

#include "selection/launch_sm80.cuh"
#include "selection/select_plain.cuh"

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

namespace {

template <typename Element>
void launch_plain(const SelectBlocksParams& params, cudaStream_t stream) {
  const Sequences& s = params.sequences;
  const int64_t tokens = s.packed() ? s.length_q : s.batch * s.length_q;
  launch(select_blocks_plain<Element>, ceil_div(tokens * s.heads_kv, kPlainSelectWarps), 32 * kPlainSelectWarps, 0, stream,
         "select_blocks", params);
}

template <typename Element>
void launch_tensor_cores(const SelectBlocksParams& params, cudaStream_t stream) {
  if (params.q.width <= 64) {
    launch_select_blocks_sm80<Element, 64>(params, stream);
  } else if (params.q.width <= 128) {
    launch_select_blocks_sm80<Element, 128>(params, stream);
  } else if (params.q.width <= 192) {
    launch_select_blocks_sm80<Element, 192>(params, stream);
  } else {
    launch_select_blocks_sm80<Element, 256>(params, stream);
  }
}

}  // namespace

void launch_select_blocks(const SelectBlocksParams& params, ElementType type, cudaStream_t stream) {
  const bool tensor_cores = params.sequences.group <= kSelectColumns &&
                            params.block_size / params.block_stride <= kMostOverlap &&
                            params.select_size / params.block_stride <= kMostOverlap;
  if (type == ElementType::kFloat32) {
    launch_plain<float>(params, stream);
  } else if (type == ElementType::kFloat16) {
    tensor_cores ? launch_tensor_cores<Half>(params, stream) : launch_plain<Half>(params, stream);
  } else {
    tensor_cores ? launch_tensor_cores<BFloat16>(params, stream) : launch_plain<BFloat16>(params, stream);
  }
}

}  // namespace nsa
