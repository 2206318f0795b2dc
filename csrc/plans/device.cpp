// GPUs that are not here, as plans see them.
#include <algorithm>

#include "common/build_info.h"
#include "plans/reports.h"

namespace nsa {

Device device_of(const std::pair<int, int>& capability) {
  const auto [major, minor] = capability;
  struct Model {
    int major, minor, multiprocessors;
    int64_t shared_kilobytes;
  };
  constexpr Model kModels[] = {{8, 0, 108, 163},  {8, 6, 84, 99},   {8, 7, 16, 163},
                               {8, 9, 142, 99},   {9, 0, 132, 227}, {10, 0, 148, 227},
                               {10, 3, 148, 227}, {12, 0, 170, 99}, {12, 1, 48, 99}};
  const auto* const found = std::find_if(std::begin(kModels), std::end(kModels),
                                         [&](const Model& m) { return m.major == major && m.minor == minor; });
  const Model model = found != std::end(kModels) ? *found : Model{major, minor, 108, 99};
  const bool hopper = major == 9 && minor == 0;
  const int64_t shared_bytes = shared_bytes_allowed(model.shared_kilobytes * 1024);
  const char* no_sm90 = !hopper                             ? "the GPU is not of compute capability 9.0"
                        : portable_kernels_only()           ? "NSA_TORCH_KERNELS=portable"
                        : shared_bytes < kHopperSharedBytes ? kTooLittleShared
                        : !build_info().cuda.empty() && !holds_kernels("sm90a")
                            ? "the build has no kernels for compute capability 9.0a"
                            : nullptr;
  return {major, minor, model.multiprocessors, shared_bytes, no_sm90};
}

}  // namespace nsa
