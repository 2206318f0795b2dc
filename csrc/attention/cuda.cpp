#include "attention/cuda.h"

#include <ATen/Functions.h>

#include "attention/launch.h"
#include "common/dispatch.h"
#include "host/cuda/params.h"

namespace nsa::cuda {
namespace {

bool is_compressed(const AttentionOptions& options) { return options.block_stride != 0; }

Visibility visibility_of(const AttentionOptions& options) {
  if (is_compressed(options)) {
    return {.stride = static_cast<int32_t>(options.block_stride),
            .first_seen = static_cast<int32_t>(options.block_size - 1),
            .window = Visibility::kNoWindow,
            .by_stride = Divisor(static_cast<uint32_t>(options.block_stride))};
  }
  const int64_t window = min_of(options.window.guard_int(__FILE__, __LINE__), Visibility::kNoWindow);
  return {.stride = 1, .first_seen = 0, .window = static_cast<int32_t>(window), .by_stride = Divisor(1)};
}

CallSequences sequences_of(const at::Tensor& q, const at::Tensor& k, const AttentionOptions& options) {
  int64_t length_k = k.size(-3);
  if (is_compressed(options) && !options.packing.packed()) {
    length_k = options.seqlen_k->guard_int(__FILE__, __LINE__);
  }
  return list_sequences(q, k, length_k, options.packing, is_compressed(options), options.block_size,
                        options.block_stride);
}

}  // namespace

bool range_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const AttentionOptions& options, const at::Tensor& out, const at::Tensor& lse,
                             const Gating& gating) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  if (q.numel() == 0 || q.size(-3) == 0) {
    return false;
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const CallSequences call = sequences_of(q, k, options);
  const at::Tensor q_read = readable(q);
  const at::Tensor k_read = readable(k);
  const at::Tensor v_read = readable(v);
  const at::Tensor out_written = out.defined() ? writable(out) : out;
  GatedSum sum{};
  if (gating.sum.defined() && (!out.defined() || out_written.is_same(out))) {
    sum = {.gates = gating.gates,
           .others = {gating.others[0].data_ptr(), gating.others[1].data_ptr()},
           .out = gating.sum.data_ptr()};
  }
  TensorView out_view = view_of(out.defined() ? out_written : gating.sum);
  if (!out.defined()) {
    out_view.data = nullptr;
  }
  const RangeForwardParams params{.sequences = call.sequences,
                                  .visibility = visibility_of(options),
                                  .compressed = is_compressed(options),
                                  .scale = forward_scale(options, q),
                                  .q = view_of(q_read),
                                  .k = view_of(k_read),
                                  .v = view_of(v_read),
                                  .out = out_view,
                                  .lse = rows_of(lse),
                                  .num_keys = k.size(-3),
                                  .sum = sum};
  bool sums = false;
  if (is_16_bit(type)) {
    sums = launch_range_forward(params, type, stream);
  } else if (out.defined()) {
    launch_range_forward_plain(params, stream);
  }
  if (out.defined()) {
    copy_back(out_written, out);
  }
  fill_unused_rows(options.packing, {{out}, {sums ? gating.sum : at::Tensor()}, {lse, Unused::Value::kNothingSeen}});
  return sums;
}

AttentionGradients range_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const BackwardRows& rows,
                                            const AttentionOptions& options, const at::Tensor& grad_q) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  const bool packed = options.packing.packed();
  const at::Tensor dq = grad_q.defined() ? grad_q : at::empty(q.sizes(), q.options());
  const at::Tensor dk = empty_key_gradient(k, packed);
  const at::Tensor dv = empty_key_gradient(v, packed);
  if (q.numel() == 0 || k.numel() == 0) {
    if (!grad_q.defined()) {
      dq.zero_();
    }
    dk.zero_();
    dv.zero_();
    return {dq, dk, dv};
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const CallSequences call = sequences_of(q, k, options);
  const at::Tensor q_read = readable(q);
  const at::Tensor k_read = readable(k);
  const at::Tensor v_read = readable(v);
  const at::Tensor grad_out_read = readable(grad_out);
  const at::Tensor dq_written = writable(dq);
  const at::Tensor dk_written = writable(dk);
  const at::Tensor dv_written = writable(dv);
  const bool separate = !dq_written.is_same(dq) && grad_q.defined();  // the sum with grad_q is then taken here
  RangeBackwardParams params{.sequences = call.sequences,
                             .visibility = visibility_of(options),
                             .compressed = is_compressed(options),
                             .scale = static_cast<float>(softmax_scale(options.scale, q.size(-1))),
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
                             .num_keys = k.size(-3),
                             .splits = 1,
                             .rows_per_split = 0,
                             .partials = nullptr};
  if (is_16_bit(type)) {
    const RangeSplits splits = choose_range_splits(params, type, multiprocessors());
    const at::Tensor partials = at::empty({splits.partial_floats}, q.options().dtype(at::kFloat));
    params.splits = splits.splits;
    params.rows_per_split = splits.rows_per_split;
    params.partials = splits.partial_floats > 0 ? partials.mutable_data_ptr<float>() : nullptr;
    launch_range_backward(params, type, stream);
  } else {
    launch_range_backward_plain(params, stream);
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
