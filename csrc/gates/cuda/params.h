// What the kernels of gates and deltas are told. Rows are (b, t, h): packed sequences are one batch entry of sum Tq
// tokens.
#pragma once

#include "common/params.h"
#include "gates/tiles.h"

namespace nsa {

constexpr int kBranches = gate_tiles::kBranches;  // compressed, selected, window

struct RowCounts {
  int64_t batch;
  int64_t tokens;  // below 2^31
  int32_t heads;   // Hq
};

struct CombineGatesParams {
  RowCounts rows;
  GatesView gates;             // (B, Tq, Hq, 3)
  TensorView outs[kBranches];  // (B, Tq, Hq, Dv)
  TensorView out;              // (B, Tq, Hq, Dv)
};

struct GateGradientsParams {
  RowCounts rows;
  GatesView gates;             // (B, Tq, Hq, 3)
  TensorView grad_out;         // (B, Tq, Hq, Dv)
  TensorView outs[kBranches];  // (B, Tq, Hq, Dv)
  GatesView grad_gates;        // (B, Tq, Hq, 3): <grad_out, out_b>
  RowView deltas[kBranches];   // (B, Hq, Tq): <grad_out, out_b>
  RowView scales[kBranches];   // (B, Hq, Tq): gate_b
};

struct DeltaParams {
  RowCounts rows;
  TensorView grad_out;  // (B, Tq, Hq, Dv)
  TensorView out;       // (B, Tq, Hq, Dv)
  RowView grad_lse;     // (B, Hq, Tq), or null: 0
  RowView delta;        // (B, Hq, Tq): <grad_out, out> - grad_lse
};

}  // namespace nsa
