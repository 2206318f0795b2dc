// The end of a plan of attention over listed blocks: tiles, with the stages that fit the device, and launches.
#pragma once

#include "selected/plan.h"

namespace nsa {

// `plan` has all else.
void set_launches(SelectedForwardPlan& plan, const SelectedForwardParams& params, const Device& device);
// `pairs`: entries of all lists.
void set_launches(SelectedBackwardPlan& plan, const SelectedBackwardParams& params, int64_t pairs,
                  const Device& device);

}  // namespace nsa
