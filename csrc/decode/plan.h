// How a decoding step is cut, and which kernels run it.
#pragma once

#include "common/plan.h"
#include "decode/params.h"
#include "decode/tiles.h"

namespace nsa {

struct DecodePlan {
  KernelChoice kernel;
  int32_t row_tiles;  // of 16 rows, that a block of threads has
  int32_t part_row_tiles;
  Launches launches;  // ranges, choose, selected; choose is a part of selected on sm90
  // Workspace.
  int64_t floats;
  int64_t ints;
};

// Cuts the work: fills in params' numbers of splits and parts. From shapes alone, so that a captured graph stays valid;
// with num_splits above 0, of the compressed keys, independent of the batch too.
DecodePlan plan_decode(DecodeParams& params, ElementType type, int32_t num_splits, const Device& device);

// The most tokens of a sequence that the choice has room for.
int64_t most_decode_tokens(const DecodeParams& params, const Device& device);

// Points params into a workspace of the plan's sizes.
void place_workspace(DecodeParams& params, float* floats, int32_t* ints);

}  // namespace nsa
