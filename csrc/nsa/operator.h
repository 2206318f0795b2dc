// The whole of Native Sparse Attention, composed of the branches' ops: what its forward returns and its backward reads.
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "common/geometry.h"
#include "host/checks.h"
#include "host/options.h"

namespace nsa {

struct NsaInputs {
  at::Tensor q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates;
};

inline AttentionOptions nsa_options(int64_t block_size, int64_t block_stride, int64_t select_size, c10::SymInt window,
                                    OptionalDouble scale, OptionalTensor block_indices, Packing packing) {
  return {.block_size = block_size,
          .block_stride = block_stride,
          .select_size = select_size,
          .window = std::move(window),
          .scale = scale,
          .block_indices = std::move(block_indices),
          .packing = std::move(packing)};
}

// out, out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, block_indices
using NsaResults =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, and which of them are asked for.
using NsaMask = std::array<bool, 8>;
using NsaGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// ValueError or TypeError that names the argument.
void check_nsa(const NsaInputs& in, const AttentionOptions& options);

// The dtype in which gates are applied and their gradients summed.
inline at::ScalarType wide_dtype(const at::Tensor& q) { return lse_dtype(q); }

// (B, Tq, Hq, 1): the gate of one branch.
inline at::Tensor gate_of(const at::Tensor& gates, int64_t branch, at::ScalarType type) {
  return gates.narrow(-1, branch, 1).to(type);
}

}  // namespace nsa
