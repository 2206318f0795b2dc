// What the kernels of attention over listed blocks are told.
#pragma once

#include "common/params.h"

namespace nsa {

struct SelectedForwardParams {
  Sequences sequences;
  float scale;
  int32_t select_size;           // l'
  int32_t num_selected;          // n
  const int32_t* block_indices;  // (B, Tq, Hkv, n) or (sum Tq, Hkv, n), contiguous: ascending, -1 last
  TensorView q;                  // (B, Tq, Hq, Dk)
  TensorView k;                  // (B, Tk, Hkv, Dk)
  TensorView v;                  // (B, Tk, Hkv, Dv)
  TensorView out;                // (B, Tq, Hq, Dv)
  RowView lse;                   // (B, Hq, Tq)
};

// The lists turned round: which queries chose each block. A block's queries are cut into segments, for balance.
struct ChosenBy {
  int64_t blocks;           // slots of blocks, times Hkv
  int32_t segment;          // queries per segment, at most
  const int32_t* queries;   // (pairs,) queries (counted through the whole batch), sorted by block, ascending
  const int32_t* begins;    // (blocks + 1,) where each block's queries begin
  const int32_t* segments;  // (blocks + 1,) segments before each block: at least one each
  const int32_t* partials;  // (blocks + 1,) segments before each block among blocks of more than one
  int64_t full_segments;    // pairs / segment: what the host knows of segments[blocks] ...
  int64_t max_segments;     // ... and its bound, with one more for each block
};

// How the lists are turned round: pairs (block, query) are sorted by block, which keeps queries in order.
struct InvertListsParams {
  Sequences sequences;
  int32_t select_size;
  int32_t num_selected;
  const int32_t* block_indices;
  int64_t pairs;   // entries of all lists
  int64_t blocks;  // as in ChosenBy
  int32_t segment;
  int32_t* keys;         // (pairs,) workspace
  int32_t* sorted_keys;  // (pairs,) workspace
  int32_t* values;       // (pairs,) workspace
  int32_t* queries;      // (pairs,) and the next three: what ChosenBy points at
  int32_t* begins;
  int32_t* segments;
  int32_t* partials;
  void* temporary;  // workspace of temporary_bytes
  int64_t temporary_bytes;
};

struct SelectedBackwardParams {
  Sequences sequences;
  float scale;
  int32_t select_size;
  int32_t num_selected;
  const int32_t* block_indices;
  ChosenBy chosen_by;
  TensorView q, k, v, grad_out;
  RowView lse, delta, gate, grad_lse;  // as in attention/params.h
  TensorView grad_q, grad_k, grad_v;
  bool add_to_grad_q;
  float* partials;  // (partials[blocks], keys per block, Dk + Dv)
};

}  // namespace nsa
