#include "common/build_info.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace nsa {
namespace {

constexpr const char* kHopper = "9.0a";

#if defined(NSA_CUDA_VERSION)
constexpr const char* kCuda = NSA_CUDA_VERSION;
#else
constexpr const char* kCuda = "";
#endif
#if defined(NSA_CUDA_ARCHITECTURES)
constexpr const char* kArchitectures = NSA_CUDA_ARCHITECTURES;  // separated by commas
#else
constexpr const char* kArchitectures = "";
#endif
#if defined(_OPENMP)
constexpr bool kOpenMp = true;
#else
constexpr bool kOpenMp = false;
#endif

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> entries;
  std::istringstream stream(list);
  for (std::string entry; std::getline(stream, entry, ',');) {
    entries.push_back(entry);
  }
  return entries;
}

bool holds(const std::vector<std::string>& names, const std::string& wanted) {
  return std::find(names.begin(), names.end(), wanted) != names.end();
}

}  // namespace

BuildInfo build_info() {
  const std::vector<std::string> architectures = split(kArchitectures);
  std::vector<std::string> kernels{"cpu"};
  if (!architectures.empty()) {
    kernels.emplace_back("sm80");
  }
  if (holds(architectures, kHopper)) {
    kernels.emplace_back("sm90a");
  }
  return {kCuda, __VERSION__, kOpenMp, architectures, kernels};
}

bool holds_kernels(const std::string& set) { return holds(build_info().kernels, set); }

bool portable_kernels_only() {
  const char* wanted = std::getenv("NSA_TORCH_KERNELS");
  return wanted != nullptr && std::string(wanted) == "portable";
}

int64_t shared_bytes_allowed(int64_t bytes) {
  constexpr int64_t kLeastKilobytes = 99;  // that every kernel which runs anywhere does with
  const char* wanted = std::getenv("NSA_TORCH_SHARED_KB");
  if (wanted == nullptr || *wanted == '\0') {
    return bytes;
  }
  int64_t kilobytes = 0;
  const char* const end = wanted + std::strlen(wanted);
  const auto [stop, error] = std::from_chars(wanted, end, kilobytes);
  if (error != std::errc() || stop != end || kilobytes < kLeastKilobytes || kilobytes > 1 << 20) {
    throw std::invalid_argument("NSA_TORCH_SHARED_KB must be a whole number of KB from 99 on, got '" +
                                std::string(wanted) + "'");
  }
  return std::min(bytes, kilobytes * 1024);
}

std::string missing_kernels(const std::vector<std::string>& architectures, int major, int minor) {
  if (major != 9 || minor != 0 || holds(architectures, kHopper)) {
    return "";
  }
  return "nsa_torch was built without its kernels for Hopper GPUs (compute capability 9.0a): the portable kernels run, "
         "which take about twice as long. Build it again with TORCH_CUDA_ARCH_LIST=9.0a, or with that variable unset.";
}

}  // namespace nsa
