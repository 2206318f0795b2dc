#include "host/packing.h"

#include <c10/util/Exception.h>

#include "common/geometry.h"

namespace nsa {
namespace {

// `maximum` bounds what a kernel's grid covers, so a longer sequence would be left half done.
void check_cumulative(const char* name, const at::Tensor& lengths, const std::optional<c10::SymInt>& maximum,
                      const char* maximum_name) {
  const int32_t* cu = lengths.const_data_ptr<int32_t>();
  const int64_t batch = lengths.numel() - 1;
  TORCH_CHECK_VALUE(cu[0] == 0, name, " must start with 0, got ", cu[0]);
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(cu[b] <= cu[b + 1], name, " must not decrease, got ", cu[b], " before ", cu[b + 1]);
    if (maximum.has_value()) {
      const int64_t bound = maximum->guard_int(__FILE__, __LINE__);
      TORCH_CHECK_VALUE(cu[b + 1] - cu[b] <= bound, maximum_name, " must be at least the longest sequence, got ", bound,
                        " with a sequence of ", cu[b + 1] - cu[b]);
    }
  }
}

void check_total(const char* name, const at::Tensor& lengths, int64_t total) {
  const int32_t last = lengths.const_data_ptr<int32_t>()[lengths.numel() - 1];
  TORCH_CHECK_VALUE(last == total, name, " must end with the number of tokens, ", total, ", got ", last);
}

SequencePlace place(int64_t batch, int64_t q_begin, int64_t q_length, int64_t k_begin, int64_t k_length,
                    int64_t cmp_begin) {
  constexpr int64_t kMost = 0x7fffffff;
  TORCH_CHECK_VALUE(q_length <= kMost && k_length <= kMost, "q must have fewer than 2^31 tokens a sequence, got ",
                    q_length, " and ", k_length, " keys");
  return {.batch = batch,
          .q_begin = q_begin,
          .q_length = static_cast<int32_t>(q_length),
          .k_begin = k_begin,
          .k_length = static_cast<int32_t>(k_length),
          .cmp_begin = cmp_begin,
          .offset = default_offset(q_length, k_length)};
}

// Packed sequences, with room for the blocks of every slot.
std::vector<SequencePlace> list_packed(const Packing& packing, int64_t tokens_q, int64_t block_size,
                                       int64_t block_stride) {
  const at::Tensor cu_q = packing.cu_seqlens_q->contiguous();
  const at::Tensor cu_k = packing.cu_seqlens_k->contiguous();
  check_cumulative("cu_seqlens_q", cu_q, packing.max_seqlen_q, "max_seqlen_q");
  check_cumulative("cu_seqlens_k", cu_k, packing.max_seqlen_k, "max_seqlen_k");
  check_total("cu_seqlens_q", cu_q, tokens_q);
  const int32_t* q = cu_q.const_data_ptr<int32_t>();
  const int32_t* k = cu_k.const_data_ptr<int32_t>();
  const at::Tensor seqused = packing.seqused_k.has_value() ? packing.seqused_k->contiguous() : at::Tensor();
  const int32_t* used = seqused.defined() ? seqused.const_data_ptr<int32_t>() : nullptr;
  std::vector<SequencePlace> sequences;
  int64_t cmp_begin = 0;
  for (int64_t b = 0; b < cu_k.numel() - 1; ++b) {
    const int64_t slot = k[b + 1] - k[b];
    const int64_t k_length = used == nullptr ? slot : used[b];
    const int64_t q_length = q[b + 1] - q[b];
    TORCH_CHECK_VALUE(0 <= k_length && k_length <= slot, "seqused_k must lie between 0 and the slot's ", slot,
                      " keys, got ", k_length, " for sequence ", b);
    TORCH_CHECK_VALUE(q_length <= k_length, "cu_seqlens_q must not give a sequence more queries than keys, got ",
                      q_length, " queries and ", k_length, " keys for sequence ", b);
    sequences.push_back(place(0, q[b], q_length, k[b], k_length, cmp_begin));
    cmp_begin += num_compressed_blocks(slot, block_size, block_stride);
  }
  return sequences;
}

std::vector<SequencePlace> list_dense(int64_t batch, int64_t q_length, int64_t k_length) {
  std::vector<SequencePlace> sequences;
  for (int64_t b = 0; b < batch; ++b) {
    sequences.push_back(place(b, 0, q_length, 0, k_length, 0));
  }
  return sequences;
}

}  // namespace

void check_cumulative_lengths(const char* name, const at::Tensor& lengths, int64_t tokens, const char* maximum_name,
                              const std::optional<c10::SymInt>& maximum) {
  check_cumulative(name, lengths.contiguous(), maximum, maximum_name);
  check_total(name, lengths.contiguous(), tokens);
}

std::vector<SequencePlace> place_sequences(const Packing& packing, int64_t batch, int64_t tokens_q, int64_t tokens_k) {
  if (!packing.packed()) {
    return list_dense(batch, tokens_q, tokens_k);
  }
  std::vector<SequencePlace> sequences = list_packed(packing, tokens_q, 1, 1);
  check_total("cu_seqlens_k", packing.cu_seqlens_k->contiguous(), tokens_k);
  return sequences;
}

std::vector<SequencePlace> place_compressed_sequences(const Packing& packing, int64_t batch, int64_t tokens_q,
                                                      int64_t tokens_cmp, const std::optional<c10::SymInt>& seqlen_k,
                                                      int64_t block_size, int64_t block_stride) {
  if (!packing.packed()) {
    return list_dense(batch, tokens_q, seqlen_k->guard_int(__FILE__, __LINE__));
  }
  std::vector<SequencePlace> sequences = list_packed(packing, tokens_q, block_size, block_stride);
  if (!sequences.empty()) {
    const SequencePlace& last = sequences.back();
    const int64_t needed = last.cmp_begin + num_compressed_blocks(last.k_length, block_size, block_stride);
    TORCH_CHECK_VALUE(needed <= tokens_cmp, "k_cmp must hold the ", needed, " blocks of cu_seqlens_k, got ",
                      tokens_cmp);
  }
  return sequences;
}

}  // namespace nsa
