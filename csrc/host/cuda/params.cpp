#include "host/cuda/params.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/util/Exception.h>

#include "common/dispatch.h"
#include "common/sequences.h"
#include "common/unused_rows.h"
#include "host/cuda/device.h"

namespace nsa::cuda {
namespace {

bool rows_are_aligned(const at::Tensor& tensor) {
  constexpr int64_t kAlignment = 8;  // elements in 16 bytes
  if (tensor.size(-1) % kAlignment != 0 || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0) {
    return false;
  }
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) % kAlignment != 0) {
      return false;
    }
  }
  return true;
}

int64_t rounded_up(int64_t width) { return ceil_div(width, 8) * 8; }

at::Tensor contiguous_lengths(const at::Tensor& lengths) { return lengths.contiguous(); }

}  // namespace

ElementType element_type(const char* name, const at::Tensor& tensor) {
  device_at(tensor.device().index());  // refuses a GPU that the build does not serve
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kHalf:
      return ElementType::kFloat16;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float16, bfloat16 or float32 on CUDA, got ", tensor.scalar_type(),
                       ": float64 is computed on the CPU only");
  }
}

void check_head_dims(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK_VALUE(q.size(-1) <= kLargestHeadDim && v.size(-1) <= kLargestHeadDim,
                    "q and v must have head dimensions of at most ", kLargestHeadDim, " on CUDA, got ", q.size(-1),
                    " and ", v.size(-1));
  constexpr int64_t kMost = 0x7fffffff;
  TORCH_CHECK_VALUE(q.size(-3) * (q.size(-2) / k.size(-2)) <= kMost,
                    "q must have fewer than 2^31 rows per KV head on CUDA, got ", q.sizes());
}

at::Tensor unit_stride(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

at::Tensor readable(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) {
    return unit_stride(tensor);
  }
  if (tensor.numel() == 0 || ((tensor.stride(-1) == 1) && rows_are_aligned(tensor))) {
    return tensor;
  }
  const int64_t width = tensor.size(-1);
  if (width == rounded_up(width)) {
    return tensor.clone(at::MemoryFormat::Contiguous);
  }
  return at::constant_pad_nd(tensor, {0, rounded_up(width) - width}).contiguous();
}

bool is_writable(const at::Tensor& result) {
  return result.scalar_type() == at::kFloat || result.numel() == 0 || rows_are_aligned(result);
}

at::Tensor writable(const at::Tensor& result) {
  if (is_writable(result)) {
    return result;
  }
  at::DimVector shape(result.sizes().begin(), result.sizes().end());
  shape.back() = rounded_up(shape.back());
  return at::zeros(shape, result.options());
}

void copy_back(const at::Tensor& written, const at::Tensor& result) {
  if (!written.is_same(result)) {
    result.copy_(written.narrow(-1, 0, result.size(-1)));
  }
}

TensorView view_of(const at::Tensor& tensor) {
  const bool dense = tensor.dim() == 4;
  return {.data = tensor.data_ptr(),
          .batch_stride = dense ? tensor.stride(0) : 0,
          .token_stride = tensor.stride(-3),
          .head_stride = tensor.stride(-2),
          .width = static_cast<int32_t>(tensor.size(-1))};
}

RowView rows_of(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return {.data = nullptr, .batch_stride = 0, .head_stride = 0};
  }
  return {.data = static_cast<float*>(tensor.data_ptr()),
          .batch_stride = tensor.dim() == 3 ? tensor.stride(0) : 0,
          .head_stride = tensor.stride(-2)};
}

SequenceTables lay_out_sequences(const at::Tensor& q, const at::Tensor& k, int64_t length_k, const Packing& packing,
                                 bool compressed, int64_t block_size, int64_t block_stride) {
  SequenceTables tables{};
  SequenceLayout& s = tables.layout;
  s.heads_kv = static_cast<int32_t>(k.size(-2));
  s.group = static_cast<int32_t>(q.size(-2) / k.size(-2));
  s.by_group = Divisor(static_cast<uint32_t>(s.group));
  s.length_q = q.size(-3);
  s.length_k = length_k;
  if (!packing.packed()) {
    s.batch = static_cast<int32_t>(q.size(0));
    s.offset = default_offset(s.length_q, s.length_k);
    return tables;
  }
  tables.cumulative_q = contiguous_lengths(*packing.cu_seqlens_q);
  tables.cumulative_k = contiguous_lengths(*packing.cu_seqlens_k);
  s.batch = static_cast<int32_t>(tables.cumulative_k.size(0) - 1);
  s.cumulative_q = tables.cumulative_q.const_data_ptr<int32_t>();
  s.cumulative_k = tables.cumulative_k.const_data_ptr<int32_t>();
  if (packing.seqused_k.has_value()) {
    tables.used_k = contiguous_lengths(*packing.seqused_k);
    s.used_k = tables.used_k.const_data_ptr<int32_t>();
  }
  if (compressed) {
    tables.cumulative_cmp = at::empty({s.batch + 1}, tables.cumulative_k.options());
    launch_cumulative_blocks(s, static_cast<int32_t>(block_size), static_cast<int32_t>(block_stride),
                             tables.cumulative_cmp.mutable_data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream());
    s.cumulative_cmp = tables.cumulative_cmp.const_data_ptr<int32_t>();
  }
  return tables;
}

void fill_unused_rows(const Packing& packing, std::initializer_list<Unused> results) {
  if (!packing.packed() || packing.cu_seqlens_q->size(0) < 2) {
    return;
  }
  const at::Tensor cumulative = contiguous_lengths(*packing.cu_seqlens_q);
  FillUnusedRowsParams params{.cumulative = cumulative.const_data_ptr<int32_t>(),
                              .batch = static_cast<int32_t>(cumulative.size(0) - 1),
                              .tokens = 0,
                              .count = 0,
                              .rows = {}};
  for (const Unused& result : results) {
    const at::Tensor& x = result.tensor;
    if (!x.defined() || x.numel() == 0) {
      continue;
    }
    TORCH_INTERNAL_ASSERT(x.is_contiguous() && params.count < kMostFilled);
    const bool of_lse = result.value == Unused::Value::kNothingSeen;
    params.tokens = x.size(of_lse ? -1 : -3);
    const int32_t word_bytes = static_cast<int32_t>(min_of(x.element_size(), 4));
    const int64_t row_words = of_lse ? 1 : x.size(-2) * x.size(-1);
    params.rows[params.count++] = {.data = x.mutable_data_ptr(),
                                   .outer = of_lse ? x.size(0) : 1,
                                   .words = row_words * (x.element_size() / word_bytes),
                                   .word_bytes = word_bytes,
                                   .value = result.value == Unused::Value::kZero      ? 0
                                            : result.value == Unused::Value::kNoBlock ? 0xffffffffu
                                                                                      : 0xff800000u};
  }
  if (params.count > 0) {
    launch_fill_unused_rows(params, c10::cuda::getCurrentCUDAStream());
  }
}

}  // namespace nsa::cuda
