#include "selection/cuda/call.h"

#include <c10/util/Exception.h>

#include "host/cuda/device.h"
#include "host/cuda/params.h"
#include "selection/cuda/launch.h"

namespace nsa::cuda {

void check_selection_supported(const at::Tensor& q, const at::Tensor& k_cmp, int64_t select_size, int64_t num_selected,
                               const AttentionOptions& options) {
  TORCH_CHECK_VALUE(num_selected <= kMostSelected, "num_selected must be at most ", kMostSelected, " on CUDA, got ",
                    num_selected, " (the CPU takes any)");
  TORCH_CHECK_VALUE(options.block_size / options.block_stride <= kMostPieces, "block_size must be at most ",
                    kMostPieces, " strides on CUDA, got ", options.block_size, " with stride ", options.block_stride,
                    " (the CPU takes any)");
  TORCH_CHECK_VALUE(select_size / options.block_stride <= kMostPieces, "select_size must be at most ", kMostPieces,
                    " strides on CUDA, got ", select_size, " with stride ", options.block_stride,
                    " (the CPU takes any)");
  TORCH_CHECK_VALUE(q.scalar_type() == at::kFloat || q.size(-2) / k_cmp.size(-2) <= kMostHeads, "q must have at most ",
                    kMostHeads, " heads per KV head in 16 bits on CUDA, got ", q.size(-2), " and ", k_cmp.size(-2));
}

void select_blocks(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& lse, int64_t select_size,
                   int64_t num_selected, const ForcedBlocks& forced, const AttentionOptions& options,
                   const at::Tensor& block_indices) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k_cmp, k_cmp);
  check_selection_supported(q, k_cmp, select_size, num_selected, options);
  const c10::cuda::CUDAGuard guard(q.device());
  if (q.numel() == 0) {
    return;
  }
  const bool packed = options.packing.packed();
  const int64_t length_k = packed ? 0 : options.seqlen_k->guard_int(__FILE__, __LINE__);
  const SequenceTables tables =
      lay_out_sequences(q, k_cmp, length_k, options.packing, true, options.block_size, options.block_stride);
  const at::Tensor q_read = readable(q);
  const at::Tensor k_read = readable(k_cmp);
  const at::Tensor lse_read = lse.contiguous();
  const SelectBlocksParams params{.sequences = tables.layout,
                                  .scale = static_cast<float>(softmax_scale(options.scale, q.size(-1))),
                                  .block_size = static_cast<int32_t>(options.block_size),
                                  .block_stride = static_cast<int32_t>(options.block_stride),
                                  .select_size = static_cast<int32_t>(select_size),
                                  .num_selected = static_cast<int32_t>(num_selected),
                                  .forced = forced,
                                  .q = view_of(q_read),
                                  .k = view_of(k_read),
                                  .lse = rows_of(lse_read),
                                  .num_keys = k_read.size(-3),
                                  .block_indices = block_indices.mutable_data_ptr<int32_t>()};
  const SelectBlocksPlan plan = plan_select_blocks(params, type, current_device());
  launch_select_blocks(params, plan, type, c10::cuda::getCurrentCUDAStream());
  fill_unused_rows(options.packing, {{block_indices, Unused::Value::kNoBlock}});
}

}  // namespace nsa::cuda
