// From tensors to what kernels are told: views, sequences, and copies where a kernel can't read a tensor in place.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <initializer_list>

#include "common/params.h"
#include "host/options.h"

namespace nsa::cuda {

// What every call asks first. TypeError for float64, which has no kernels, RuntimeError on a GPU that has none.
ElementType element_type(const char* name, const at::Tensor& tensor);
inline bool is_16_bit(ElementType type) { return type != ElementType::kFloat32; }

// ValueError unless the kernels take heads of these widths, and the sequences' rows can be counted in 32 bits.
void check_head_dims(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// The tensor itself where kernels can read it in place; else a contiguous copy, 16-bit ones with columns of zeros up to
// a multiple of 8, so that 16-byte copies can read every row.
at::Tensor readable(const at::Tensor& tensor);

// The tensor itself, or a copy whose last stride is 1.
at::Tensor unit_stride(const at::Tensor& tensor);

// Whether kernels can write a tensor in place.
bool is_writable(const at::Tensor& result);
// A tensor like `result` that kernels can write: `result` itself, or a wider one, of zeros, to be copied by
// `copy_back`.
at::Tensor writable(const at::Tensor& result);
void copy_back(const at::Tensor& written, const at::Tensor& result);

// (B, T, H, D), or packed (sum T, H, D).
TensorView view_of(const at::Tensor& tensor);
// (B, H, T), or packed (H, sum T), float32, contiguous; of no tensor: null.
RowView rows_of(const at::Tensor& tensor);

// Scores that are masked are -inf, and 0 times that is NaN: a scale of 0 becomes one so small that the result is the
// same.
inline float forward_scale(const AttentionOptions& options, const at::Tensor& q) {
  const float scale = static_cast<float>(softmax_scale(options.scale, q.size(-1)));
  return scale == 0.f ? 1e-30f : scale;
}

// A layout, and the tensors that its pointers point into.
struct SequenceTables {
  SequenceLayout layout;
  at::Tensor cumulative_q, cumulative_k, used_k, cumulative_cmp;
};

// `length_k`: uncompressed keys of a dense sequence, of all packed ones. For ops on compressed keys, with block sizes.
SequenceTables lay_out_sequences(const at::Tensor& q, const at::Tensor& k, int64_t length_k, const Packing& packing,
                                 bool compressed, int64_t block_size, int64_t block_stride);

// A result of a packed call, and what its rows hold that belong to no sequence: 0 in every tensor of numbers, -1 in a
// list of blocks, -inf in lse. Tokens are dimension -3 of a tensor of three dimensions, the last of lse (Hq, sum Tq).
struct Unused {
  at::Tensor tensor;
  enum class Value { kZero, kNoBlock, kNothingSeen } value = Value::kZero;
};

// Fills those rows: the last entry of cu_seqlens_q may lie before the tokens' end. Nothing to do for a dense call.
void fill_unused_rows(const Packing& packing, std::initializer_list<Unused> results);

}  // namespace nsa::cuda
