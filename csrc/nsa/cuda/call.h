// Gates on CUDA, fused: the host's part.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "gates/cuda/call.h"
#include "nsa/operator.h"

namespace nsa::cuda {

// The window branch, and out = sum_b gate_b out_b, by the branch's kernel where it can take that sum. out_win is
// undefined where `keep` is false and nothing needed it.
struct GatedWindow {
  at::Tensor out, out_win, lse_win;
};
GatedWindow gated_window(const NsaInputs& in, const AttentionOptions& options, const at::Tensor& out_cmp,
                         const at::Tensor& out_slc, bool keep);

}  // namespace nsa::cuda
