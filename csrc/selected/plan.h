// Which kernels attend over listed blocks, how KV heads are shared out to launches, and what workspace they take.
#pragma once

#include "common/plan.h"
#include "selected/params.h"

namespace nsa {

// Kernels for Hopper that walk the union of the lists of a tile of queries: the rows of a query, and lists of up to 16
// blocks or of more.
enum class UnionKind {
  kNarrow,  // 16 rows, up to 16 blocks
  kLong,    // 16 rows
  kWide,    // 8 rows, or 16 in turn
  kWidest,  // 4 rows, up to 16 blocks
};

struct SelectedForwardPlan {
  KernelChoice kernel;
  UnionKind kind;  // for Hopper
};
SelectedForwardPlan plan_selected_forward(const SelectedForwardParams& params, ElementType type, const Device& device);

struct SelectedBackwardPlan {
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
};
// `params` needs of chosen_by the number of blocks alone, and lacks what the plan says.
SelectedBackwardPlan plan_selected_backward(const SelectedBackwardParams& params, ElementType type,
                                            const Device& device);

// What the kernels for Hopper are made of; their shapes are held to it.
namespace selected_sm90 {

constexpr int32_t kBlockKeys = 64;        // keys of a selection block
constexpr int32_t kMostSelected = 64;     // blocks of a list
constexpr int32_t kMostNarrow = 16;       // of a short one
constexpr int32_t kMostBlocks = 1 << 16;  // of a sequence
constexpr int32_t kMostWidestBlocks = 1 << 12;
// Rows of a step of the gradients of keys: as many as two rings of at least three stages leave room for beside K and V.
constexpr int32_t key_step_rows(int32_t tile_k) { return tile_k <= 64 ? 64 : tile_k <= 128 ? 48 : 32; }

}  // namespace selected_sm90
}  // namespace nsa
