#include "selected/cuda.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "common/dispatch.h"
#include "host/cuda/params.h"
#include "selected/launch.h"
#include "selected/pieces.h"

namespace nsa::cuda {
namespace {

int32_t select_size_of(const AttentionOptions& options) { return static_cast<int32_t>(options.select_size); }

int64_t count_blocks(const Sequences& sequences, int32_t select_size) {
  const int64_t slots = sequences.packed() ? sequences.length_k / select_size + sequences.batch
                                           : sequences.batch * ceil_div(sequences.length_k, select_size);
  return slots * sequences.heads_kv;
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
  // Enough segments for every multiprocessor to have several, so that the long lists of the first blocks hold nobody
  // up.
  constexpr int64_t kSegmentsPerMultiprocessor = 8;
  constexpr int64_t kLeastQueries = 256;
  const Sequences& sequences = params.sequences;
  const int64_t blocks = params.chosen_by.blocks;
  const int64_t pairs = lists.numel();
  TORCH_CHECK_VALUE(blocks < 0x7fffffff && pairs < 0x7fffffff,
                    "block_indices must hold fewer than 2^31 numbers for fewer than 2^31 blocks on CUDA, got ",
                    lists.sizes());
  const bool by_pieces = plan.keys_heads > 0;
  const bool ranked = plan.handed_heads > 0;
  const int64_t segment = max_of(ceil_div(pairs, kSegmentsPerMultiprocessor * multiprocessors()), kLeastQueries);
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
                           .segment = static_cast<int32_t>(segment),
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
    invert.pieces = plan_key_pieces(sequences, params.num_selected, pairs, blocks,
                                    2 * (params.q.width + params.v.width), plan.keys_heads, multiprocessors());
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
           .full_segments = pairs / segment,
           .max_segments = pairs / segment + blocks,
           .pieces = invert.pieces},
          storage,
          pieces};
}

}  // namespace

void selected_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const AttentionOptions& options, const at::Tensor& out, const at::Tensor& lse) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  if (q.numel() == 0) {
    return;
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const CallSequences call = list_sequences(q, k, k.size(-3), options.packing, false, 0, 0);
  const at::Tensor lists = options.block_indices->contiguous();
  const at::Tensor q_read = readable(q);
  const at::Tensor k_read = readable(k);
  const at::Tensor v_read = readable(v);
  const at::Tensor out_written = writable(out);
  const SelectedForwardParams params{.sequences = call.sequences,
                                     .scale = forward_scale(options, q),
                                     .select_size = select_size_of(options),
                                     .num_selected = static_cast<int32_t>(lists.size(-1)),
                                     .block_indices = lists.const_data_ptr<int32_t>(),
                                     .q = view_of(q_read),
                                     .k = view_of(k_read),
                                     .v = view_of(v_read),
                                     .out = view_of(out_written),
                                     .lse = rows_of(lse)};
  if (is_16_bit(type)) {
    launch_selected_forward(params, type, stream);
  } else {
    launch_selected_forward_plain(params, stream);
  }
  copy_back(out_written, out);
  fill_unused_rows(options.packing, {{out}, {lse, Unused::Value::kNothingSeen}});
}

AttentionGradients selected_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v, const BackwardRows& rows,
                                               const AttentionOptions& options, const at::Tensor& grad_q) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  const bool packed = options.packing.packed();
  const at::Tensor dq = grad_q.defined() ? grad_q : at::empty(q.sizes(), q.options());
  const at::Tensor dk = empty_key_gradient(k, packed);
  const at::Tensor dv = empty_key_gradient(v, packed);
  const at::Tensor lists = options.block_indices->contiguous();
  if (q.numel() == 0 || k.numel() == 0 || lists.numel() == 0) {
    if (!grad_q.defined()) {
      dq.zero_();
    }
    dk.zero_();
    dv.zero_();
    return {dq, dk, dv};
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const CallSequences call = list_sequences(q, k, k.size(-3), options.packing, false, 0, 0);
  const at::Tensor q_read = readable(q);
  const at::Tensor k_read = readable(k);
  const at::Tensor v_read = readable(v);
  const at::Tensor grad_out_read = readable(grad_out);
  const at::Tensor dq_written = writable(dq);
  const at::Tensor dk_written = writable(dk);
  const at::Tensor dv_written = writable(dv);
  const bool separate = !dq_written.is_same(dq) && grad_q.defined();  // the sum with grad_q is then taken here
  SelectedBackwardParams params{.sequences = call.sequences,
                                .scale = static_cast<float>(softmax_scale(options.scale, q.size(-1))),
                                .select_size = select_size_of(options),
                                .num_selected = static_cast<int32_t>(lists.size(-1)),
                                .block_indices = lists.const_data_ptr<int32_t>(),
                                .chosen_by = {.blocks = count_blocks(call.sequences, select_size_of(options))},
                                .q = view_of(q_read),
                                .k = view_of(k_read),
                                .v = view_of(v_read),
                                .grad_out = view_of(grad_out_read),
                                .lse = rows_of(rows.lse),
                                .delta = rows_of(rows.delta),
                                .gate = rows.gate.defined() ? rows_of(rows.gate) : no_rows(),
                                .grad_lse = rows.grad_lse.defined() ? rows_of(rows.grad_lse) : no_rows(),
                                .grad_q = view_of(dq_written),
                                .grad_k = view_of(dk_written),
                                .grad_v = view_of(dv_written),
                                .add_to_grad_q = grad_q.defined() && !separate,
                                .partials = nullptr,
                                .keys_heads = 0,
                                .handed = {}};
  const SelectedBackwardPlan plan = is_16_bit(type) ? selected_backward_plan(params, type) : SelectedBackwardPlan{};
  const InvertedLists inverted = invert_lists(params, lists, plan, stream);
  params.keys_heads = plan.keys_heads;
  params.chosen_by = inverted.chosen_by;
  if (is_16_bit(type)) {
    at::Tensor handed;
    if (plan.handed_heads > 0) {
      handed = at::empty({plan.handed_bytes}, q.options().dtype(at::kByte));
      params.handed.data = handed.mutable_data_ptr();
      params.handed.heads = plan.handed_heads;
    }
    const at::Tensor partials = at::empty({selected_partial_floats(params)}, q.options().dtype(at::kFloat));
    params.partials = partials.mutable_data_ptr<float>();
    launch_selected_backward(params, type, stream);
  } else {
    launch_selected_backward_plain(params, stream);
  }
  if (separate) {
    dq.add_(dq_written.narrow(-1, 0, dq.size(-1)));
  } else {
    copy_back(dq_written, dq);
  }
  copy_back(dk_written, dk);
  copy_back(dv_written, dv);
  if (!grad_q.defined()) {
    fill_unused_rows(options.packing, {{dq}});
  }
  return {dq, dk, dv};
}

}  // namespace nsa::cuda
