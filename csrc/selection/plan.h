// Which kernel chooses blocks.
#pragma once

#include "common/plan.h"
#include "selection/params.h"
#include "selection/tiles.h"

namespace nsa {

struct SelectBlocksPlan {
  KernelChoice kernel;
  int32_t slot;    // for Hopper: heads of a slot; of larger groups a query has several slots
  int32_t listed;  // for Hopper: blocks that a list has room for
  Launches launches;
};
SelectBlocksPlan plan_select_blocks(const SelectBlocksParams& params, ElementType type, const Device& device);

}  // namespace nsa
