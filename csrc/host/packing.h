// How the sequences of a call lie in its tensors: dense (B, T, H, D), or packed (sum T, H, D) with cumulative lengths.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/params.h"

namespace nsa {

struct Packing {
  std::optional<at::Tensor> cu_seqlens_q;  // (B + 1,) int32: where each sequence's queries start
  std::optional<at::Tensor> cu_seqlens_k;  // (B + 1,) int32: where each sequence's uncompressed keys start
  std::optional<c10::SymInt> max_seqlen_q;
  std::optional<c10::SymInt> max_seqlen_k;
  std::optional<at::Tensor> seqused_k;  // (B,) int32: keys in use of each slot of cu_seqlens_k; absent: all of them

  bool packed() const { return cu_seqlens_k.has_value(); }
};

// ValueError unless `lengths` rise from 0 to `tokens` by at most `maximum` at a time.
void check_cumulative_lengths(const char* name, const at::Tensor& lengths, int64_t tokens, const char* maximum_name,
                              const std::optional<c10::SymInt>& maximum);

// Where the sequences of a call on the CPU lie, read from the lengths. ValueError when the lengths contradict the
// tensors, which hold `tokens_q` queries and `tokens_k` keys (of one batch entry when dense).
std::vector<SequencePlace> place_sequences(const Packing& packing, int64_t batch, int64_t tokens_q, int64_t tokens_k);

// The same for an op whose keys are compressed: `tokens_cmp` compressed ones, of `seqlen_k` keys when dense.
std::vector<SequencePlace> place_compressed_sequences(const Packing& packing, int64_t batch, int64_t tokens_q,
                                                      int64_t tokens_cmp, const std::optional<c10::SymInt>& seqlen_k,
                                                      int64_t block_size, int64_t block_stride);

}  // namespace nsa
