// Which kernel chooses blocks.
#pragma once

#include "common/plan.h"
#include "selection/params.h"

namespace nsa {

struct SelectBlocksPlan {
  KernelChoice kernel;
  int32_t slot;    // for Hopper: heads of a slot; of larger groups a query has several slots
  int32_t listed;  // for Hopper: blocks that a list has room for
};
SelectBlocksPlan plan_select_blocks(const SelectBlocksParams& params, ElementType type, const Device& device);

// What the kernels for Hopper are built for.
namespace select_sm90 {

constexpr int32_t kMostHeads = 128;  // of a group
constexpr int32_t kLargestSlot = 16;
constexpr int32_t kMostListed = 64;
// Small slots of wide heads have room for shorter lists.
constexpr int32_t most_listed(int32_t tile_k, int32_t slot) { return tile_k > 128 && slot == 4 ? 32 : kMostListed; }

}  // namespace select_sm90
}  // namespace nsa
