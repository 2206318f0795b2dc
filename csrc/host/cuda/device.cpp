#include "host/cuda/device.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>

#include <array>
#include <mutex>
#include <string>

#include "common/build_info.h"
#include "common/sm90/tensor_map.h"

namespace nsa::cuda {
namespace {

const char* why_no_sm90(const cudaDeviceProp& properties, int64_t shared_bytes) {
  if (properties.major != 9 || properties.minor != 0) {
    return "the GPU is not of compute capability 9.0";
  }
  if (portable_kernels_only()) {
    return "NSA_TORCH_KERNELS=portable";
  }
  if (shared_bytes < kHopperSharedBytes) {
    return kTooLittleShared;
  }
  if (!holds_kernels("sm90a")) {
    TORCH_WARN(missing_kernels(build_info().architectures, properties.major, properties.minor));
    return "the build has no kernels for compute capability 9.0a";
  }
  if (tensor_map_encoder() == nullptr) {
    return "the driver makes no tensor maps";
  }
  return nullptr;
}

Device describe(c10::DeviceIndex index) {
  const cudaDeviceProp& properties = *at::cuda::getDeviceProperties(index);
  const std::string nothing_runs = no_kernels(build_info().architectures, properties.major, properties.minor);
  TORCH_CHECK(nothing_runs.empty(), nothing_runs);
  const int64_t shared_bytes = shared_bytes_allowed(static_cast<int64_t>(properties.sharedMemPerBlockOptin));
  return {.major = properties.major,
          .minor = properties.minor,
          .multiprocessors = properties.multiProcessorCount,
          .shared_bytes = shared_bytes,
          .no_sm90 = why_no_sm90(properties, shared_bytes)};
}

}  // namespace

const Device& device_at(c10::DeviceIndex index) {
  constexpr size_t kMostDevices = 64;
  static std::array<Device, kMostDevices> devices;
  static std::array<std::once_flag, kMostDevices> described;
  const auto at = static_cast<size_t>(index);
  TORCH_CHECK(at < kMostDevices, "nsa_torch: there are plans for the first ", kMostDevices, " devices only");
  std::call_once(described[at], [&] { devices[at] = describe(index); });
  return devices[at];
}

const Device& current_device() { return device_at(c10::cuda::current_device()); }

}  // namespace nsa::cuda
