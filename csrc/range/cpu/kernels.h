// Attention over one contiguous range of keys for each query, on the CPU. The compressed and the window branch differ
// only in the range and in where a sequence's keys start.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "common/geometry.h"
#include "host/options.h"

namespace nsa::cpu {

struct CompressedKeys {
  CompressedRange range;

  KeyRange visible(int64_t position) const { return range(position); }
  int64_t first_row(const SequencePlace& sequence) const { return sequence.cmp_begin; }
};

struct WindowKeys {
  WindowRange range;

  KeyRange visible(int64_t position) const { return range(position); }
  int64_t first_row(const SequencePlace& sequence) const { return sequence.k_begin; }
};

// Writes out and lse, which are allocated.
template <typename Keys>
void range_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                             const std::vector<SequencePlace>& sequences, const Keys& keys, const at::Tensor& out,
                             const at::Tensor& lse);

// dq, dk, dv, where they are wanted.
template <typename Keys>
AttentionGradients range_attention_backward(const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse,
                                            const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                            const at::Tensor& out, const at::Tensor& lse, double scale,
                                            const std::vector<SequencePlace>& sequences, const Keys& keys,
                                            const GradientMask& wanted);

}  // namespace nsa::cpu
