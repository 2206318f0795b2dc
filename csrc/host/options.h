// The options of the attention ops behind their flat schemas; each op uses those it has.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "host/packing.h"

namespace nsa {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalInt = std::optional<c10::SymInt>;
using OptionalDouble = std::optional<double>;

using OutAndLse = std::tuple<at::Tensor, at::Tensor>;
// dq, dk, dv: undefined where they are not asked for.
using AttentionGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// Which of them a backward computes, the output_mask of its op.
using GradientMask = std::array<bool, 3>;

enum class Branch { kCompressed, kSelected, kWindow };

struct AttentionOptions {
  Branch branch = Branch::kCompressed;
  OptionalInt seqlen_k;      // compressed: uncompressed keys of a dense call
  int64_t block_size = 0;    // compressed
  int64_t block_stride = 0;  // compressed
  int64_t select_size = 0;   // selected
  c10::SymInt window = 0;    // window
  OptionalDouble scale;
  OptionalTensor block_indices;  // selected
  Packing packing;
};

inline AttentionOptions compressed_options(OptionalInt seqlen_k, int64_t block_size, int64_t block_stride,
                                           OptionalDouble scale, Packing packing) {
  return {.branch = Branch::kCompressed,
          .seqlen_k = std::move(seqlen_k),
          .block_size = block_size,
          .block_stride = block_stride,
          .scale = scale,
          .packing = std::move(packing)};
}

inline AttentionOptions window_options(c10::SymInt window, OptionalDouble scale, Packing packing) {
  return {.branch = Branch::kWindow, .window = std::move(window), .scale = scale, .packing = std::move(packing)};
}

inline AttentionOptions selected_options(int64_t select_size, OptionalDouble scale, at::Tensor block_indices,
                                         Packing packing) {
  return {.branch = Branch::kSelected,
          .select_size = select_size,
          .scale = scale,
          .block_indices = std::move(block_indices),
          .packing = std::move(packing)};
}

// How C++ calls the ops of a branch, through the dispatcher: for their autograd Function (host/branch_function.h) and
// for nsa/.
using BranchForward = OutAndLse(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const AttentionOptions& options);
using BranchBackward = AttentionGradients(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                          const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const at::Tensor& out, const at::Tensor& lse, GradientMask output_mask,
                                          const AttentionOptions& options);

inline double softmax_scale(const OptionalDouble& scale, int64_t head_dim) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
}

// The sequences of an op on compressed keys, whose tensors do not tell how many uncompressed keys there were.
inline std::vector<SequencePlace> place_compressed_sequences(const at::Tensor& q, const at::Tensor& k_cmp,
                                                             const AttentionOptions& options) {
  return place_compressed_sequences(options.packing, q.size(0), q.size(-3), k_cmp.size(-3), options.seqlen_k,
                                    options.block_size, options.block_stride);
}

}  // namespace nsa
