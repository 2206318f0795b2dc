#include "common/launch.cuh"
#include "common/sequences.h"

namespace nsa {
namespace {

__global__ void cumulative_blocks(const int32_t* cumulative_k, int32_t batch, int32_t block_size, int32_t block_stride,
                                  int32_t* cumulative) {
  int32_t sum = 0;
  for (int32_t b = 0; b < batch; ++b) {
    cumulative[b] = sum;
    sum += static_cast<int32_t>(num_compressed_blocks(cumulative_k[b + 1] - cumulative_k[b], block_size, block_stride));
  }
  cumulative[batch] = sum;
}

}  // namespace

void launch_cumulative_blocks(const SequenceLayout& sequences, int32_t block_size, int32_t block_stride,
                              int32_t* cumulative, cudaStream_t stream) {
  cumulative_blocks<<<1, 1, 0, stream>>>(sequences.cumulative_k, sequences.batch, block_size, block_stride, cumulative);
  check_cuda(cudaGetLastError(), "places of compressed keys");
}

}  // namespace nsa
