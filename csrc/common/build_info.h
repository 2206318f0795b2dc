// What the kernels were built with, and what a GPU misses in them. Which torch the host part was built against is known
// to Python (nsa_torch/_library.py), since one library of kernels serves several.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nsa {

struct BuildInfo {
  std::string cuda;  // "" when built without
  std::string compiler;
  bool openmp;
  std::vector<std::string> architectures;  // compute capabilities, such as "8.0+PTX" and "9.0a"; none without CUDA
  std::vector<std::string> kernels;        // sets of kernels: "cpu", "sm80" (portable), "sm90a" (Hopper)
};

BuildInfo build_info();

// Whether the build has a set of kernels.
bool holds_kernels(const std::string& set);

// Whether kernels made for one GPU are left out, for comparisons: the environment's NSA_TORCH_KERNELS is "portable".
bool portable_kernels_only();

// The bytes of shared memory that a block of threads may take where the GPU lets it have `bytes`: fewer, for tests, if
// the environment's NSA_TORCH_SHARED_KB says so. Throws std::invalid_argument unless that is 99 or more.
int64_t shared_bytes_allowed(int64_t bytes);

// What to tell the user of a GPU of this compute capability if a build for `architectures` lacks kernels that were made
// for it; "" where it lacks none.
std::string missing_kernels(const std::vector<std::string>& architectures, int major, int minor);

// The same where a build for `architectures` has no code at all that runs on the GPU; "" where it has.
std::string no_kernels(const std::vector<std::string>& architectures, int major, int minor);

}  // namespace nsa
