// The whole of Native Sparse Attention, composed of the branches' ops: what its forward returns and its backward reads.
#pragma once

#include <array>
#include <tuple>

#include "common/geometry.h"
#include "host/options.h"

namespace nsa {

struct NsaInputs {
  at::Tensor q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates;
};

// out, out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, block_indices
using NsaResults =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Of q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates.
using NsaGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace nsa
