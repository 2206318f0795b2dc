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

// Whether code for an architecture, such as "8.6", "8.0+PTX" or "9.0a", runs on a GPU: by CUDA's rules of
// compatibility.
bool serves(const std::string& architecture, int major, int minor) {
  const char* const end = architecture.data() + architecture.size();
  int of_major = 0;
  int of_minor = 0;
  const char* const point = std::from_chars(architecture.data(), end, of_major).ptr;
  if (point == end || std::from_chars(point + 1, end, of_minor).ptr == point + 1) {
    return false;
  }
  if (architecture.find('a') != std::string::npos) {  // of this one alone
    return of_major == major && of_minor == minor;
  }
  const bool of_family = architecture.find('f') != std::string::npos;
  const bool has_ptx = architecture.find("+PTX") != std::string::npos && !of_family;
  return (of_major == major && of_minor <= minor) || (has_ptx && of_major < major);
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

std::string no_kernels(const std::vector<std::string>& architectures, int major, int minor) {
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  if (major < 8) {
    return "nsa_torch needs a GPU of compute capability 8.0 or newer, and this one is of " + capability +
           ". The CPU computes the same: move the tensors there.";
  }
  std::string list;
  for (const std::string& architecture : architectures) {
    if (serves(architecture, major, minor)) {
      return "";
    }
    list += (list.empty() ? "" : ", ") + architecture;
  }
  return "nsa_torch was built for GPUs of compute capability " + list + ", and nothing of that runs on one of " +
         capability +
         ". Build it again with TORCH_CUDA_ARCH_LIST=\"8.0+PTX;9.0a\", which serves every GPU from 8.0 on.";
}

}  // namespace nsa
