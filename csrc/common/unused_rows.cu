// Grid: a fixed number of blocks, since how many rows there are is known on the device alone; mostly there are none.
#include "common/geometry.h"
#include "common/launch.cuh"
#include "common/unused_rows.h"

namespace nsa {
namespace {

constexpr int kBlocks = 128;
constexpr int kThreads = 256;

template <typename Word>
__device__ void fill(const UnusedRows& rows, int64_t tokens, int64_t first) {
  const int64_t words = (tokens - first) * rows.words;
  const int64_t all = rows.outer * words;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += int64_t{kBlocks} * kThreads) {
    const int64_t outer = i / words;
    static_cast<Word*>(rows.data)[(outer * tokens + first) * rows.words + (i - outer * words)] =
        static_cast<Word>(rows.value);
  }
}

__global__ void __launch_bounds__(kThreads) fill_unused_rows(const __grid_constant__ FillUnusedRowsParams params) {
  const int64_t first = max_of(params.cumulative[params.batch], 0);
  if (first >= params.tokens) {
    return;
  }
  for (int i = 0; i < params.count; ++i) {
    if (params.rows[i].word_bytes == 2) {
      fill<uint16_t>(params.rows[i], params.tokens, first);
    } else {
      fill<uint32_t>(params.rows[i], params.tokens, first);
    }
  }
}

}  // namespace

void launch_fill_unused_rows(const FillUnusedRowsParams& params, cudaStream_t stream) {
  launch(fill_unused_rows, kBlocks, kThreads, 0, stream, "rows of no sequence", params);
}

}  // namespace nsa
