// Which kernels attend over listed blocks, how KV heads are shared out to launches, and what workspace they take.
#pragma once

#include "common/plan.h"
#include "selected/params.h"
#include "selected/tiles.h"

namespace nsa {

struct SelectedForwardPlan {
  KernelChoice kernel;
  UnionKind kind;  // for Hopper
  KernelTile tile;
  Launches launches;
};
SelectedForwardPlan plan_selected_forward(const SelectedForwardParams& params, ElementType type, const Device& device);

struct SelectedBackwardPlan {
  NeededGradients needed;
  KernelChoice query;      // the gradient of q
  KernelChoice keys;       // the gradients of k and v: by segments of a block's queries; for Hopper by pieces
  UnionKind kind;          // of the kernel of the gradient of q for Hopper
  int32_t keys_heads;      // KV heads of a launch by pieces; 0: by segments
  int32_t handed_heads;    // KV heads at a time whose scores' gradients the kernel of the gradients of k and v hands to
                           // that of the gradient of q; 0: it computes them itself
  int64_t handed_bytes;    // workspace for what is handed over
  int32_t segment;         // queries of a block that are summed up together, at most
  KeyPieces pieces;        // all but the pointers
  int64_t partial_floats;  // workspace for sums
  KernelTile query_tile;
  Launches launches;
};
// `params` needs of chosen_by the number of blocks alone, and lacks what the plan says.
SelectedBackwardPlan plan_selected_backward(const SelectedBackwardParams& params, ElementType type,
                                            const Device& device, NeededGradients needed);

// How many blocks lists may have, so that every kernel's part of a list fits the shared memory of the device.
int64_t most_listed(int64_t head_dim, int64_t v_head_dim, ElementType type, const Device& device);

}  // namespace nsa
