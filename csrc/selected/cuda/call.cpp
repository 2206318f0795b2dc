#include "selected/cuda/call.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "host/cuda/device.h"
#include "host/cuda/gradients.h"
#include "selected/cuda/launch.h"
#include "selected/pieces.h"

namespace nsa::cuda {
namespace {

int32_t select_size_of(const AttentionOptions& options) { return static_cast<int32_t>(options.select_size); }

int64_t count_blocks(const SequenceLayout& sequences, int32_t select_size) {
  const int64_t slots = sequences.packed() ? sequences.length_k / select_size + sequences.batch
                                           : sequences.batch * ceil_div(sequences.length_k, select_size);
  return slots * sequences.heads_kv;
}

void check_pairs(const SelectedBackwardParams& params, const at::Tensor& lists) {
  constexpr int64_t kMost = 0x7fffffff;
  TORCH_CHECK_VALUE(params.chosen_by.blocks < kMost && lists.numel() < kMost,
                    "block_indices must hold fewer than 2^31 numbers for fewer than 2^31 blocks on CUDA, got ",
                    lists.sizes());
}

// The lists turned round, and the tensors that the pointers point into.
struct InvertedLists {
  ChosenBy chosen_by;
  at::Tensor storage;
  at::Tensor pieces;
};

// `params` lacks what this makes, but for the number of blocks.
InvertedLists invert_lists(const SelectedBackwardParams& params, const at::Tensor& lists,
                           const SelectedBackwardPlan& plan, cudaStream_t stream) {
  const SequenceLayout& sequences = params.sequences;
  const int64_t blocks = params.chosen_by.blocks;
  const int64_t pairs = lists.numel();
  const bool by_pieces = plan.keys_heads > 0;
  const bool ranked = plan.handed_heads > 0;
  const int64_t temporary_bytes = invert_lists_temporary_bytes(pairs, blocks);
  const auto ints = lists.options().dtype(at::kInt);
  const at::Tensor storage = at::empty({pairs + 3 * (blocks + 1)}, ints);
  const at::Tensor workspace = at::empty({3 * pairs}, ints);
  const at::Tensor temporary = at::empty({temporary_bytes}, lists.options().dtype(at::kByte));
  int32_t* const queries = storage.mutable_data_ptr<int32_t>();
  int32_t* const keys = workspace.mutable_data_ptr<int32_t>();
  InvertListsParams invert{.sequences = sequences,
                           .select_size = params.select_size,
                           .num_selected = params.num_selected,
                           .block_indices = params.block_indices,
                           .pairs = pairs,
                           .blocks = blocks,
                           .segment = plan.segment,
                           .ranked = ranked,
                           .keys = keys,
                           .sorted_keys = keys + pairs,
                           .values = keys + 2 * pairs,
                           .queries = queries,
                           .begins = queries + pairs,
                           .segments = by_pieces ? nullptr : queries + pairs + blocks + 1,
                           .partials = queries + pairs + 2 * (blocks + 1),
                           .pieces = {},
                           .edges = nullptr,
                           .pieces_before = nullptr,
                           .temporary = temporary.mutable_data_ptr(),
                           .temporary_bytes = temporary_bytes};
  at::Tensor pieces;
  at::Tensor edges;
  if (by_pieces) {
    invert.pieces = plan.pieces;
    pieces = at::empty({key_pieces_ints(invert.pieces, sequences, blocks)}, ints);
    edges = at::empty({(2 * invert.pieces.chunks + 1) * blocks}, ints);
    place_key_pieces(invert.pieces, sequences, pieces.mutable_data_ptr<int32_t>());
    invert.edges = edges.mutable_data_ptr<int32_t>();
    invert.pieces_before = invert.edges + (invert.pieces.chunks + 1) * blocks;
  }
  launch_invert_lists(invert, stream);
  return {{.blocks = blocks,
           .segment = invert.segment,
           .ranks = ranked ? Divisor(static_cast<uint32_t>(invert.num_selected)) : Divisor(),
           .queries = invert.queries,
           .begins = invert.begins,
           .segments = invert.segments,
           .partials = invert.partials,
           .full_segments = pairs / plan.segment,
           .max_segments = pairs / plan.segment + blocks,
           .pieces = invert.pieces},
          storage,
          pieces};
}

}  // namespace

void check_lists_fit(const at::Tensor& q, const at::Tensor& v, const at::Tensor& block_indices) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Device& device = current_device();
  const int64_t most = most_listed(q.size(-1), v.size(-1), element_type("q", q), device);
  TORCH_CHECK_VALUE(block_indices.size(-1) <= most, "block_indices must list at most ", most,
                    " blocks for head dimensions ", q.size(-1), " and ", v.size(-1), " on a GPU with ",
                    device.shared_bytes, " bytes of shared memory for a block of threads, got ",
                    block_indices.size(-1));
}

void selected_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const AttentionOptions& options, const at::Tensor& out, const at::Tensor& lse) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  if (q.numel() == 0) {
    return;
  }
  const SequenceTables tables = lay_out_sequences(q, k, k.size(-3), options.packing, false, 0, 0);
  const at::Tensor lists = options.block_indices->contiguous();
  const at::Tensor q_read = readable(q);
  const at::Tensor k_read = readable(k);
  const at::Tensor v_read = readable(v);
  const at::Tensor out_written = writable(out);
  const SelectedForwardParams params{.sequences = tables.layout,
                                     .scale = forward_scale(options, q),
                                     .select_size = select_size_of(options),
                                     .num_selected = static_cast<int32_t>(lists.size(-1)),
                                     .block_indices = lists.const_data_ptr<int32_t>(),
                                     .q = view_of(q_read),
                                     .k = view_of(k_read),
                                     .v = view_of(v_read),
                                     .out = view_of(out_written),
                                     .lse = rows_of(lse)};
  const SelectedForwardPlan plan = plan_selected_forward(params, type, current_device());
  launch_selected_forward(params, plan, type, c10::cuda::getCurrentCUDAStream());
  copy_back(out_written, out);
  fill_unused_rows(options.packing, {{out}, {lse, Unused::Value::kNothingSeen}});
}

AttentionGradients selected_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v, const BackwardRows& rows,
                                               const GradientMask& wanted, const AttentionOptions& options,
                                               const at::Tensor& grad_q) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  const GradientTensors tensors(grad_out, q, k, v, options.packing, wanted, grad_q);
  const at::Tensor lists = options.block_indices->contiguous();
  if (q.numel() == 0 || k.numel() == 0 || lists.numel() == 0) {
    return tensors.zeros();
  }
  const SequenceTables tables = lay_out_sequences(q, k, k.size(-3), options.packing, false, 0, 0);
  SelectedBackwardParams params{.sequences = tables.layout,
                                .scale = static_cast<float>(softmax_scale(options.scale, q.size(-1))),
                                .select_size = select_size_of(options),
                                .num_selected = static_cast<int32_t>(lists.size(-1)),
                                .block_indices = lists.const_data_ptr<int32_t>(),
                                .chosen_by = {.blocks = count_blocks(tables.layout, select_size_of(options))},
                                .partials = nullptr,
                                .handed = {}};
  tensors.tell(params);
  rows.tell(params);
  check_pairs(params, lists);
  const SelectedBackwardPlan plan = plan_selected_backward(params, type, current_device(), tensors.needed());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const InvertedLists inverted = plan.needed.keys ? invert_lists(params, lists, plan, stream) : InvertedLists{};
  const at::Tensor handed = at::empty({plan.handed_bytes}, q.options().dtype(at::kByte));
  const at::Tensor partials = at::empty({plan.partial_floats}, q.options().dtype(at::kFloat));
  params.chosen_by = inverted.chosen_by;
  params.handed.data = plan.handed_heads > 0 ? handed.mutable_data_ptr() : nullptr;
  params.handed.heads = plan.handed_heads;
  params.partials = partials.mutable_data_ptr<float>();
  launch_selected_backward(params, plan, type, stream);
  return tensors.finish();
}

}  // namespace nsa::cuda
