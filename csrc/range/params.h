// What the kernels of attention over a range of keys are told. Shapes as in docs/math.md; every tensor dense or packed.
#pragma once

#include "common/params.h"

namespace nsa {

struct RangeForwardParams {
  SequenceLayout sequences;
  Visibility visibility;
  bool compressed;  // the keys are compressed ones: their number and their place come from the blocks
  float scale;
  TensorView q;      // (B, Tq, Hq, Dk)
  TensorView k;      // (B, Tk or M, Hkv, Dk)
  TensorView v;      // (B, Tk or M, Hkv, Dv)
  TensorView out;    // (B, Tq, Hq, Dv); its data may be null where there is a sum
  RowView lse;       // (B, Hq, Tq)
  int64_t num_keys;  // keys of the branch: dense, of every sequence; packed, of all
  GatedSum sum;      // or none
};

struct RangeBackwardParams {
  SequenceLayout sequences;
  Visibility visibility;
  bool compressed;
  float scale;
  TensorView q, k, v;   // as above
  TensorView grad_out;  // (B, Tq, Hq, Dv)
  RowView lse;          // (B, Hq, Tq)
  RowView delta;        // (B, Hq, Tq): <grad_out, out>, less the gradient of lse where there is no gate
  RowView gate;         // (B, Hq, Tq): the factor of grad_out, or null: 1
  RowView grad_lse;     // (B, Hq, Tq): what delta holds of it, or null: 0
  TensorView grad_q;    // (B, Tq, Hq, Dk)
  TensorView grad_k;    // (B, Tk or M, Hkv, Dk)
  TensorView grad_v;    // (B, Tk or M, Hkv, Dv)
  bool add_to_grad_q;   // grad_q += instead of =
  int64_t num_keys;     // keys of the branch: dense, of every sequence; packed, of all
  // Rows of a key tile may be shared out to several blocks of threads, whose sums are added afterwards, in order.
  int32_t splits;
  int32_t rows_per_split;
  float* partials;  // (key tiles, Hkv, splits, keys per tile, Dk + Dv of the tile), or null when splits is 1
};

}  // namespace nsa
