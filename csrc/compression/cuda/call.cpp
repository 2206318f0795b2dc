#include "compression/cuda/call.h"

#include <ATen/Functions.h>
#include <ATen/cuda/CUDAContext.h>

#include "compression/cuda/launch.h"

namespace nsa::cuda {
namespace {

void lay_out_packed(CompressCall& call, const at::Tensor& cu_seqlens) {
  BlockLayout& layout = call.layout;
  call.cumulative_tokens = cu_seqlens.contiguous();
  call.cumulative_blocks = at::empty({layout.batch + 1}, cu_seqlens.options());
  call.block_chunks = at::empty({layout.num_blocks}, cu_seqlens.options());
  call.packed_chunks = at::empty({layout.num_chunks, 4}, cu_seqlens.options());
  layout.cumulative_tokens = call.cumulative_tokens.const_data_ptr<int32_t>();
  layout.cumulative_blocks = call.cumulative_blocks.mutable_data_ptr<int32_t>();
  layout.block_chunks = call.block_chunks.mutable_data_ptr<int32_t>();
  layout.packed_chunks = static_cast<PackedChunk*>(call.packed_chunks.mutable_data_ptr());
  launch_packed_layout(layout, call.stream);
}

CompressSizes sizes_of(const at::Tensor& x, const PhiWeights& weights, const BlockLayout& layout, bool packed) {
  const int64_t hidden = weights.w1.has_value() ? weights.w1->size(-2) : 0;
  return {.chunks = layout.num_chunks,
          .blocks = layout.num_blocks,
          .heads = x.size(-2),
          .width = x.size(-1),
          .hidden = hidden,
          .result = weights.w2.has_value() ? weights.w2->size(-2) : hidden,
          .block_size = layout.block_size,
          .block_stride = layout.block_stride,
          .phi = weights.w2.has_value()   ? Phi::kMlp
                 : weights.w1.has_value() ? Phi::kLinear
                                          : Phi::kMean,
          .per_head_1 = weights.w1.has_value() && weights.w1->dim() == 3,
          .per_head_2 = weights.w2.has_value() && weights.w2->dim() == 3,
          .packed = packed};
}

void* data_of(const at::Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

}  // namespace

bool has_blocks(const at::Tensor& x, int64_t block_size) { return x.numel() > 0 && x.size(-3) >= block_size; }

CompressCall lay_out(const at::Tensor& x, const PhiWeights& weights, int64_t block_size, int64_t block_stride,
                     const Packing& packing, const std::optional<PhiMask>& backward) {
  CompressCall call{.type = element_type("x", x),
                    .heads = static_cast<int32_t>(x.size(-2)),
                    .stream = at::cuda::getCurrentCUDAStream(),
                    .layout = {},
                    .plan = {}};
  BlockLayout& layout = call.layout;
  layout.tokens = x.size(-3);
  layout.batch = packing.packed() ? packing.cu_seqlens_k->size(0) - 1 : x.size(0);
  layout.block_size = block_size;
  layout.block_stride = block_stride;
  layout.pieces = static_cast<int32_t>(block_size / block_stride);
  const int64_t groups = ceil_div(layout.tokens, block_stride);
  layout.num_groups = packing.packed() ? groups : layout.batch * groups;
  TORCH_CHECK_VALUE(layout.num_groups < 0x7fffffff, "x must have fewer than 2^31 chunks of block_stride on CUDA, got ",
                    layout.num_groups);
  if (packing.packed()) {
    layout.num_blocks = layout.num_chunks = layout.tokens / block_stride;
  } else {
    layout.blocks = num_compressed_blocks(layout.tokens, block_size, block_stride);
    layout.chunks = layout.blocks + layout.pieces - 1;
    layout.num_blocks = layout.batch * layout.blocks;
    layout.num_chunks = layout.batch * layout.chunks;
    layout.by_blocks = Divisor(static_cast<uint32_t>(layout.blocks));
    layout.by_chunks = Divisor(static_cast<uint32_t>(layout.chunks));
    layout.by_groups = Divisor(static_cast<uint32_t>(groups));
  }
  call.plan = plan_compress(sizes_of(x, weights, layout, packing.packed()), call.type, backward);
  if (packing.packed()) {
    lay_out_packed(call, *packing.cu_seqlens_k);
  }
  return call;
}

ChunkRows chunk_rows_of(const at::Tensor& tensor) {
  return {.data = data_of(tensor), .row_stride = tensor.stride(0), .head_stride = tensor.stride(1)};
}

BiasView bias_of(const at::Tensor& bias) {
  if (!bias.defined()) {
    return {.data = nullptr, .head_stride = 0};
  }
  return {.data = bias.const_data_ptr<float>(),
          .head_stride = bias.dim() == 2 && bias.size(0) > 1 ? bias.stride(0) : int64_t{0}};
}

}  // namespace nsa::cuda
