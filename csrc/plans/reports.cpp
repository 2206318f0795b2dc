#include "plans/reports.h"

#include <utility>

namespace nsa {

KernelReport report_of(const Launches& launches, std::string reason) {
  KernelReport report{{}, std::move(reason)};
  for (const KernelLaunch& launch : launches) {
    report.launches.push_back({launch.kernel, launch.tile, launch.count});
  }
  return report;
}

ElementType element_type(const KernelQuery& query) {
  return query.dtype == "float32"   ? ElementType::kFloat32
         : query.dtype == "float16" ? ElementType::kFloat16
                                    : ElementType::kBFloat16;
}

}  // namespace nsa
