// The GPU of the current device, as plans see it.
#pragma once

#include <c10/core/Device.h>

#include "common/plan.h"

namespace nsa::cuda {

// The errors of both: RuntimeError where the build has no code that runs on the GPU.
const Device& device_at(c10::DeviceIndex index);
const Device& current_device();

}  // namespace nsa::cuda
