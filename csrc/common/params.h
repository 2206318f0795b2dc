// What every kernel is told about its tensors: plain structs, filled on the host, copied to the device. No torch.
#pragma once

#include <cstdint>

#include "common/geometry.h"

namespace nsa {

enum class ElementType { kFloat32, kFloat16, kBFloat16 };

// A (B, T, H, D) tensor, or a packed (sum T, H, D) one, whose batch stride is 0. Strides count elements; D's is 1.
struct TensorView {
  void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
  int32_t width;  // D

  template <typename Element>
  NSA_HOST_DEVICE Element* row(int64_t batch, int64_t token, int64_t head) const {
    return static_cast<Element*>(data) + batch * batch_stride + token * token_stride + head * head_stride;
  }
};

// A float32 number for each query and head: (B, Hq, Tq), or packed (Hq, sum Tq) with batch stride 0. Tokens lie side by
// side. `data` may be null, where an op can do without.
struct RowView {
  float* data;
  int64_t batch_stride;
  int64_t head_stride;

  NSA_HOST_DEVICE float& at(int64_t batch, int64_t head, int64_t token) const {
    return data[batch * batch_stride + head * head_stride + token];
  }
};

// A (B, Tq, Hq, 3) tensor of any strides and of an element type of its own.
struct GatesView {
  void* data;
  ElementType type;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
  int64_t branch_stride;

  NSA_HOST_DEVICE int64_t offset(int64_t batch, int64_t token, int64_t head, int64_t branch) const {
    return batch * batch_stride + token * token_stride + head * head_stride + branch * branch_stride;
  }
};

// out = gates[0] others[0] + gates[1] others[1] + gates[2] (this branch's output), which the kernel of the last branch
// may write as well: others are compressed and selected, this is the window. All have the strides of this branch's
// output. No sum where out is null.
struct GatedSum {
  GatesView gates;
  const void* others[2];
  void* out;
};

// Division by a number that the compiler doesn't know, of n < 2^31, by a product and a shift.
struct Divisor {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  explicit Divisor(uint32_t d) : divisor(d), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < d) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  NSA_HOST_DEVICE Divisor() : divisor(1), multiplier(1), shift(0) {}

  NSA_HOST_DEVICE uint32_t divide(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return (__umulhi(n, multiplier) + n) >> shift;
#else
    return n / divisor;
#endif
  }
};

// How the sequences of a call lie in its tensors: dense ones all have the same lengths; packed ones lie between
// cumulative lengths.
struct SequenceLayout {
  int32_t batch;
  int32_t heads_kv;
  int32_t group;  // G: query heads that share a KV head
  Divisor by_group;
  int64_t length_q;               // dense: of every sequence; packed: sum of all
  int64_t length_k;               // the same, uncompressed keys
  int32_t offset;                 // dense: the position of every sequence's first query; packed: see place_of
  const int32_t* cumulative_q;    // packed: (B + 1,), else null
  const int32_t* cumulative_k;    // packed: (B + 1,), else null
  const int32_t* used_k;          // packed: (B,) keys in use of each slot, or null: all
  const int32_t* cumulative_cmp;  // packed, for ops on compressed keys: (B + 1,) compressed keys before each sequence

  NSA_HOST_DEVICE bool packed() const { return cumulative_k != nullptr; }
};

// Queries of all sequences, of each head.
NSA_HOST_DEVICE inline int64_t count_tokens(const SequenceLayout& s) {
  return s.packed() ? s.length_q : s.batch * s.length_q;
}

// Slots for the tiles of all sequences (common/sequences.cuh): what a grid must cover. `total` counts things, of one
// sequence when dense.
inline int64_t count_slots(const SequenceLayout& s, int64_t total, int64_t per_tile) {
  return s.packed() ? total / per_tile + s.batch : s.batch * ceil_div(total, per_tile);
}

// One of them. `batch` is 0 for a packed one, whose tokens start at q_begin and k_begin.
struct SequencePlace {
  int64_t batch;
  int64_t q_begin;
  int32_t q_length;
  int64_t k_begin;
  int32_t k_length;  // in use
  int64_t cmp_begin;
  int32_t offset;  // the position of its first query: query i stands at offset + i
};

// Which keys of a branch a position sees: key j when 0 <= p - (j * stride + first_seen) < window. The window branch has
// stride 1 and first_seen 0; compressed block j, whose last key is j d + l - 1, stride d, first_seen l - 1, no window.
struct Visibility {
  int32_t stride;
  int32_t first_seen;
  int32_t window;
  Divisor by_stride;

  static constexpr int32_t kNoWindow = 0x7fffffff;

  NSA_HOST_DEVICE int32_t end(int32_t position) const {
    return position < first_seen
               ? 0
               : static_cast<int32_t>(by_stride.divide(static_cast<uint32_t>(position - first_seen))) + 1;
  }
  // Only the window branch, whose stride is 1, has a first key other than 0.
  NSA_HOST_DEVICE int32_t begin(int32_t position) const {
    return window == kNoWindow || position < window ? 0 : position - window + 1;
  }
  // The first and the last position that see key j; later than any, where there is none.
  NSA_HOST_DEVICE int32_t first_position(int32_t key) const { return clamp(int64_t{key} * stride + first_seen); }
  NSA_HOST_DEVICE int32_t last_position(int32_t key) const {
    return window == kNoWindow ? kNoWindow : clamp(int64_t{key} * stride + first_seen + window - 1);
  }

 private:
  NSA_HOST_DEVICE static int32_t clamp(int64_t position) {
    return position < kNoWindow ? static_cast<int32_t>(position) : kNoWindow;
  }
};

}  // namespace nsa
