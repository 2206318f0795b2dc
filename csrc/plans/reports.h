// The parts of which_kernel.
#pragma once

#include <string>
#include <utility>

#include "common/plan.h"
#include "plans/which_kernel.h"

namespace nsa {

// A GPU of this capability, of the kind that has most multiprocessors.
Device device_of(const std::pair<int, int>& capability);

ElementType element_type(const KernelQuery& query);

// What a plan launches, with the rest of the report to come.
KernelReport report_of(const Launches& launches, std::string reason);

KernelReport cpu_report(const KernelQuery& query);
KernelReport cuda_report(const KernelQuery& query);
KernelReport compress_report(const KernelQuery& query);
KernelReport decode_report(const KernelQuery& query, const Device& device);

}  // namespace nsa
