// Packed calls may hold tokens after the last sequence: batches of a fixed size do, so that CUDA graphs can be
// replayed. No kernel visits them; their rows of results are filled here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nsa {

// A contiguous tensor of words of 2 or 4 bytes, seen as (outer, tokens, words), whose rows get `value`.
struct UnusedRows {
  void* data;
  int64_t outer;
  int64_t words;
  int32_t word_bytes;
  uint32_t value;
};

constexpr int kMostFilled = 4;

struct FillUnusedRowsParams {
  const int32_t* cumulative;  // (B + 1,): the last entry is the first unused token
  int32_t batch;
  int64_t tokens;
  int32_t count;
  UnusedRows rows[kMostFilled];
};

void launch_fill_unused_rows(const FillUnusedRowsParams& params, cudaStream_t stream);

}  // namespace nsa
