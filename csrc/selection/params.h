// What the kernels that choose blocks are told.
#pragma once

#include "common/params.h"

namespace nsa {

struct SelectBlocksParams {
  Sequences sequences;
  float scale;
  int32_t block_size;    // l
  int32_t block_stride;  // d
  int32_t select_size;   // l'
  int32_t num_selected;  // n
  ForcedBlocks forced;
  TensorView q;            // (B, Tq, Hq, Dk)
  TensorView k;            // (B, M, Hkv, Dk), compressed
  RowView lse;             // (B, Hq, Tq) of compressed attention
  int32_t* block_indices;  // (B, Tq, Hkv, n) or (sum Tq, Hkv, n), contiguous
};

}  // namespace nsa
