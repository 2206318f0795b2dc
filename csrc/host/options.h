// The options of the attention ops behind their flat schemas; each op uses those it has.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "host/packing.h"

namespace nsa {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalInt = std::optional<c10::SymInt>;
using OptionalDouble = std::optional<double>;

using OutAndLse = std::tuple<at::Tensor, at::Tensor>;
using AttentionGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // dq, dk, dv

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
