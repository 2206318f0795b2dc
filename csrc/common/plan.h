// What decides which kernel runs. A branch's plan (<branch>/plan.h) is a pure function of a call's shapes, strides,
// options and dtype, and of the device: made once for a call, obeyed by what allocates and launches, and printed by
// which_kernel.
#pragma once

#include <cstdint>

#include "common/params.h"

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
