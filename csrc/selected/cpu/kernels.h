// Attention over listed blocks, on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "host/options.h"

namespace nsa::cpu {

// ValueError unless every list holds -1 and distinct blocks of its own sequence.
void check_block_lists(const at::Tensor& block_indices, const std::vector<SequencePlace>& sequences,
                       int64_t select_size);

// Writes out and lse, which are allocated.
void selected_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& block_indices, int64_t select_size, double scale,
                                const std::vector<SequencePlace>& sequences, const at::Tensor& out,
                                const at::Tensor& lse);

// dq, dk, dv, where they are wanted.
AttentionGradients selected_attention_backward(const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse,
                                               const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                               const at::Tensor& block_indices, const at::Tensor& out,
                                               const at::Tensor& lse, int64_t select_size, double scale,
                                               const std::vector<SequencePlace>& sequences, const GradientMask& wanted);

}  // namespace nsa::cpu
