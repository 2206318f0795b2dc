// What the kernels of gates and deltas are told. Rows are (b, t, h): packed sequences are one batch entry of sum Tq
// tokens.
#pragma once

#include "common/params.h"

namespace nsa {

constexpr int kBranches = 3;  // compressed, selected, window

struct RowCounts {
  int64_t batch;
  int64_t tokens;  // below 2^31
  int32_t heads;   // Hq
};

// A (B, Tq, Hq, 3) tensor of any strides and of an element type of its own.
struct GatesView {
  void* data;
  ElementType type;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
  int64_t branch_stride;

  NSA_HOST_DEVICE int64_t offset(int64_t batch, int64_t token, int64_t head, int64_t branch) const {
    return batch * batch_stride + token * token_stride + head * head_stride + branch * branch_stride;
  }
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
