// A decoding step on CUDA: tensors become a plain struct, the plan is made, the workspace allocated.
#include "decode/call.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>

#include "decode/cuda/launch.h"
#include "gates/cuda/call.h"
#include "host/cuda/device.h"
#include "host/cuda/params.h"
#include "selection/params.h"

namespace nsa::cuda {
namespace {

PagedView paged_view(const at::Tensor& pages) {
  return {pages.mutable_data_ptr(),
          pages.stride(0),
          pages.stride(1),
          pages.stride(2),
          static_cast<int32_t>(pages.size(3)),
          static_cast<int32_t>(pages.size(0))};
}

bool is_aligned(const at::Tensor& pages) {
  const int64_t unit = 16 / pages.element_size();
  return reinterpret_cast<uintptr_t>(pages.const_data_ptr()) % 16 == 0 && pages.stride(0) % unit == 0 &&
         pages.stride(1) % unit == 0 && pages.stride(2) % unit == 0 && pages.size(3) % unit == 0;
}

PagedRows paged_rows(const at::Tensor& k, const at::Tensor& v, const at::Tensor& table) {
  const auto rows = static_cast<int32_t>(k.size(1));
  return {paged_view(k),
          paged_view(v),
          table.const_data_ptr<int32_t>(),
          table.stride(0),
          static_cast<int32_t>(table.size(1)),
          rows,
          Divisor(static_cast<uint32_t>(rows)),
          is_aligned(k) && is_aligned(v)};
}

void check_supported(const DecodeInputs& in, const DecodeOptions& o) {
  TORCH_CHECK_VALUE(o.num_selected <= kMostSelected, "num_selected must be at most ", kMostSelected, " on CUDA, got ",
                    o.num_selected, " (the CPU takes any)");
  const int64_t stride = o.blocks.block_stride;
  TORCH_CHECK_VALUE(o.blocks.block_size / stride <= kMostPieces, "block_size must be at most ", kMostPieces,
                    " strides on CUDA, got ", o.blocks.block_size, " with stride ", stride, " (the CPU takes any)");
  TORCH_CHECK_VALUE(o.select_size / stride <= kMostPieces && o.select_size <= 512, "select_size must be at most ",
                    kMostPieces, " strides and 512 tokens on CUDA, got ", o.select_size, " with stride ", stride,
                    " (the CPU takes any)");
  TORCH_CHECK_VALUE(in.cache_seqlens.size(0) * in.keys[0].size(2) <= 65535,
                    "cache_seqlens must be of at most 65535 sequences times KV heads on CUDA, got ",
                    in.cache_seqlens.size(0), " and ", in.keys[0].size(2));
  for (const at::Tensor* const pages :
       {&in.keys[0], &in.values[0], &in.keys[1], &in.values[1], &in.keys[2], &in.values[2]}) {
    TORCH_CHECK_VALUE(pages->size(-1) <= 1 || pages->stride(-1) == 1,
                      "keys and values must have a last stride of 1 on CUDA, got strides ", pages->strides());
  }
}

DecodeParams params_of(const DecodeInputs& in, const DecodeOptions& o) {
  const auto heads_kv = static_cast<int32_t>(in.keys[0].size(2));
  const auto group = static_cast<int32_t>(in.q.size(-2) / heads_kv);
  DecodeParams params{};
  params.batch = static_cast<int32_t>(in.cache_seqlens.size(0));
  params.heads_kv = heads_kv;
  params.group = group;
  params.queries = static_cast<int32_t>(in.max_seqlen_q);
  params.by_group = Divisor(static_cast<uint32_t>(group));
  params.by_heads_kv = Divisor(static_cast<uint32_t>(heads_kv));
  params.cumulative_q = in.cu_seqlens_q.has_value() ? in.cu_seqlens_q->const_data_ptr<int32_t>() : nullptr;
  params.cache_seqlens = in.cache_seqlens.const_data_ptr<int32_t>();
  const float scale = static_cast<float>(o.scale);
  params.scale_log2 = (scale == 0.f ? 1e-30f : scale) * 1.4426950408889634f;
  params.block_size = static_cast<int32_t>(o.blocks.block_size);
  params.block_stride = static_cast<int32_t>(o.blocks.block_stride);
  params.select_size = static_cast<int32_t>(o.select_size);
  params.num_selected = static_cast<int32_t>(o.num_selected);
  params.forced = o.forced;
  params.window = static_cast<int32_t>(o.window);
  params.by_select_size = Divisor(static_cast<uint32_t>(o.select_size));
  params.q = view_of(in.q);
  params.compressed = paged_rows(in.keys[0], in.values[0], in.tables[0]);
  params.selected = paged_rows(in.keys[1], in.values[1], in.tables[1]);
  params.windowed = paged_rows(in.keys[2], in.values[2], in.tables[2]);
  params.max_tokens = static_cast<int32_t>(in.tables[1].size(1) * in.keys[1].size(1));
  return params;
}

at::Tensor unit_rows(const at::Tensor& table) { return table.stride(-1) == 1 ? table : table.contiguous(); }

}  // namespace

void decode(const DecodeInputs& given, const DecodeOptions& options, const at::Tensor& out) {
  const ElementType type = element_type("q", given.q);
  DecodeInputs in = given;
  check_supported(in, options);
  check_head_dims(in.q, in.keys[1], in.values[1]);
  const c10::cuda::CUDAGuard guard(in.q.device());
  if (out.numel() == 0) {
    return;
  }
  in.q = unit_stride(in.q);
  in.cache_seqlens = in.cache_seqlens.contiguous();
  if (in.cu_seqlens_q.has_value()) {
    in.cu_seqlens_q = in.cu_seqlens_q->contiguous();
  }
  for (at::Tensor& table : in.tables) {
    table = unit_rows(table);
  }
  DecodeParams params = params_of(in, options);
  params.gates = gates_view(in.gates);
  params.out = view_of(out);
  const Device& device = current_device();
  const DecodePlan plan = plan_decode(params, type, static_cast<int32_t>(options.num_splits), device);
  TORCH_CHECK_VALUE(params.max_tokens <= most_decode_tokens(params, device), "block_table must have room for at most ",
                    most_decode_tokens(params, device), " tokens on this GPU, got ", params.max_tokens);
  const at::Tensor floats = at::empty({plan.floats}, in.q.options().dtype(at::kFloat));
  const at::Tensor ints = at::empty({plan.ints}, in.q.options().dtype(at::kInt));
  place_workspace(params, floats.mutable_data_ptr<float>(), ints.mutable_data_ptr<int32_t>());
  launch_decode(params, plan, type, c10::cuda::getCurrentCUDAStream());
}

}  // namespace nsa::cuda
