// The parts of which_kernel.
#pragma once

#include "common/plan.h"
#include "plans/which_kernel.h"

namespace nsa {

// A GPU of this capability, of the kind that has most multiprocessors.
Device device_of(const std::pair<int, int>& capability);

KernelReport cpu_report(const KernelQuery& query);
KernelReport cuda_report(const KernelQuery& query);

}  // namespace nsa
