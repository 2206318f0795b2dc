// What decides which kernel runs. A branch's plan (<branch>/plan.h) is a pure function of a call's shapes, strides,
// options and dtype, and of the device: made once for a call, obeyed by what allocates and launches, and printed by
// which_kernel.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "common/params.h"
#include "common/tiles.h"

namespace nsa {

// What plans know of a GPU, and of the build that runs on it.
struct Device {
  int32_t major;
  int32_t minor;
  int32_t multiprocessors;
  int64_t shared_bytes;  // that a block of threads may take
  const char* no_sm90;   // why the kernels for Hopper do not run here; null: they do
};

// The sets of kernels, which are the folders of a branch.
enum class Machine { kPlain, kSm80, kSm90 };

struct KernelChoice {
  Machine machine;
  const char* why;
};

// Which gradients a backward computes: that of q, and those of k and v, which come of the same kernel.
struct NeededGradients {
  bool query = true;
  bool keys = true;
};

// A kernel that a call launches, its tile, and how often it is launched.
struct KernelLaunch {
  const char* kernel = nullptr;  // by the name that a profile shows
  KernelTile tile;
  int64_t count = 1;
};

// Those of a plan, in their order: all of this library's, not those of cuBLAS and CUB.
struct Launches {
  static constexpr int kMost = 8;
  KernelLaunch of[kMost];
  int count = 0;

  void add(const char* kernel, const KernelTile& tile, int64_t times = 1) {
    if (count == kMost) {
      throw std::length_error("a plan has more launches than it can list");
    }
    of[count] = {kernel, tile, times};
    ++count;
  }
  const KernelLaunch* begin() const { return of; }
  const KernelLaunch* end() const { return of + count; }
};

// A kernel's name on each machine.
struct KernelNames {
  const char* plain;
  const char* sm80;
  const char* sm90;

  constexpr const char* on(Machine machine) const {
    return machine == Machine::kPlain ? plain : machine == Machine::kSm80 ? sm80 : sm90;
  }
};

// `not_for_sm90`: why a call does not suit the kernel for Hopper, or null.
inline KernelChoice choose_kernel(ElementType type, const Device& device, const char* not_for_sm90) {
  if (type == ElementType::kFloat32) {
    return {Machine::kPlain, "float32 is computed without tensor cores, whose float32 is not exact"};
  }
  if (device.no_sm90 != nullptr) {
    return {Machine::kSm80, device.no_sm90};
  }
  if (not_for_sm90 != nullptr) {
    return {Machine::kSm80, not_for_sm90};
  }
  return {Machine::kSm90, "the GPU and the call suit the kernel for compute capability 9.0"};
}

// Why a call does not suit a kernel for Hopper, in words that several of them share.
constexpr const char* kDimsTooLarge = "head dimensions above 192 and 128 have no kernel for compute capability 9.0";
constexpr const char* kNotCopied =
    "the copy engine cannot read these tensors: addresses and strides must be multiples of 16 bytes, none 0";
constexpr const char* kTooLittleShared =
    "the kernels for compute capability 9.0 need 227 KB of shared memory for a block of threads";
constexpr const char* kNoKeys = "there are no keys";

// Whether Hopper's copy engine can read a tensor of 16-bit elements: addresses in units of 16 bytes, and none twice.
inline bool copies_by_map(const TensorView& x, int64_t batch, int64_t length, int64_t heads) {
  const auto fits = [](int64_t stride, int64_t size) { return size <= 1 || (stride > 0 && stride % 8 == 0); };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.width % 8 == 0 && fits(x.batch_stride, batch) &&
         fits(x.token_stride, length) && fits(x.head_stride, heads);
}

// The same of tensors of queries and of keys.
inline bool copies_rows(const SequenceLayout& s, const TensorView& x) {
  return copies_by_map(x, s.packed() ? 1 : s.batch, s.length_q, int64_t{s.heads_kv} * s.group);
}
inline bool copies_keys(const SequenceLayout& s, const TensorView& x, int64_t num_keys) {
  return copies_by_map(x, s.packed() ? 1 : s.batch, num_keys, s.heads_kv);
}

}  // namespace nsa
