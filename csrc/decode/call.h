// What an op of a decoding step is given, checked: for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/geometry.h"
#include "host/options.h"

namespace nsa {

struct DecodeInputs {
  at::Tensor q;                    // (B, Tq, Hq, Dk), or packed
  std::array<at::Tensor, 3> keys;  // of the branches: (pages, rows of a page, Hkv, D)
  std::array<at::Tensor, 3> values;
  std::array<at::Tensor, 3> tables;  // (B, pages of a sequence)
  at::Tensor gates;
  at::Tensor cache_seqlens;
  OptionalTensor cu_seqlens_q;
  int64_t max_seqlen_q = 0;  // Tq of a dense call
};

struct DecodeOptions {
  CompressedRange blocks;
  int64_t select_size;
  int64_t num_selected;
  ForcedBlocks forced;
  int64_t window;
  double scale;
  int64_t num_splits;  // 0: as many as suit the batch
};

namespace cpu {
void decode(const DecodeInputs& in, const DecodeOptions& options, const at::Tensor& out);
}
namespace cuda {
void decode(const DecodeInputs& in, const DecodeOptions& options, const at::Tensor& out);
}

}  // namespace nsa
