// What the kernels of attention over listed blocks are told.
#pragma once

#include "common/params.h"

namespace nsa {

struct SelectedForwardParams {
  Sequences sequences;
  float scale;
  int32_t select_size;   // l'
  int32_t num_selected;  // n
  const int32_t* block_indices;  // (B, Tq, Hkv, n) or (sum Tq, Hkv, n), contiguous: ascending, -1 last
  TensorView q;                  // (B, Tq, Hq, Dk)
  TensorView k;                  // (B, Tk, Hkv, Dk)
  TensorView v;                  // (B, Tk, Hkv, Dv)
  TensorView out;                // (B, Tq, Hq, Dv)
  RowView lse;                   // (B, Hq, Tq)
};

// The lists turned round: which queries chose each block. A block's queries are cut into segments, for balance.
struct ChosenBy {
  int64_t blocks;             // slots of blocks, times Hkv
  int32_t segment;            // queries per segment, at most
  const int32_t* queries;     // (pairs,) queries (counted through the whole batch), sorted by block, ascending
  const int32_t* begins;      // (blocks + 1,) where each block's queries begin
  const int32_t* segments;    // (blocks + 1,) segments before each block: at least one each
  const int32_t* partials;    // (blocks + 1,) segments before each block among blocks of more than one
  int64_t max_segments;       // bound of segments[blocks], known on the host
};

struct SelectedBackwardParams {
  Sequences sequences;
  float scale;
  int32_t select_size;
  int32_t num_selected;
  const int32_t* block_indices;
  ChosenBy chosen_by;
  TensorView q, k, v, grad_out;
  RowView lse, delta, gate;  // as in attention/params.h
  TensorView grad_q, grad_k, grad_v;
  bool add_to_grad_q;
  float* partials;  // (partials[blocks], keys per block, Dk + Dv)
};

}  // namespace nsa
