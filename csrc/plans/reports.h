// The parts of which_kernel.
#pragma once

#include "plans/which_kernel.h"

namespace nsa {

KernelReport cpu_report(const KernelQuery& query);
KernelReport cuda_report(const KernelQuery& query);

}  // namespace nsa
