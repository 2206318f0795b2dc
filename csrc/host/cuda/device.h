// The GPU of the current device, as plans see it.
#pragma once

#include "common/plan.h"

namespace nsa::cuda {

const Device& current_device();

}  // namespace nsa::cuda
