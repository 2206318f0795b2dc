// What the kernels that choose blocks are told.
#pragma once

#include "common/params.h"

namespace nsa {

// What there are kernels for.
constexpr int32_t kMostSelected = 64;  // n
constexpr int32_t kMostPieces = 64;    // l / d and l' / d
constexpr int32_t kMostHeads = 256;    // of a group; float32: any number

struct SelectBlocksParams {
  SequenceLayout sequences;
  float scale;
  int32_t block_size;    // l
  int32_t block_stride;  // d
  int32_t select_size;   // l'
  int32_t num_selected;  // n
  ForcedBlocks forced;
  TensorView q;            // (B, Tq, Hq, Dk)
  TensorView k;            // (B, M, Hkv, Dk), compressed
  RowView lse;             // (B, Hq, Tq) of compressed attention
  int64_t num_keys;        // compressed keys: dense, of every sequence; packed, of all
  int32_t* block_indices;  // (B, Tq, Hkv, n) or (sum Tq, Hkv, n), contiguous
};

}  // namespace nsa
