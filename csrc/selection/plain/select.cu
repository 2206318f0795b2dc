// The choice of blocks in float32 (selection/plain/select.cuh).
#include "common/launch.cuh"
#include "selection/cuda/launch.h"
#include "selection/plain/select.cuh"

namespace nsa {

void launch_select_blocks_plain(const SelectBlocksParams& params, cudaStream_t stream) {
  const SequenceLayout& s = params.sequences;
  launch(select_blocks_plain, count_slots(s, s.length_q, kPlainWarps) * s.heads_kv, 32 * kPlainWarps,
         select_plain::tile(params.k.width).dynamic_bytes, stream, "choice of blocks, float32", params);
}

}  // namespace nsa
