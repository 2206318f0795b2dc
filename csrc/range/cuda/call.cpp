#include "range/cuda/call.h"

#include <ATen/Functions.h>

#include "host/cuda/device.h"
#include "host/cuda/gradients.h"
#include "range/cuda/launch.h"

namespace nsa::cuda {
namespace {

bool is_compressed(const AttentionOptions& options) { return options.branch == Branch::kCompressed; }

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

SequenceTables sequences_of(const at::Tensor& q, const at::Tensor& k, const AttentionOptions& options) {
  int64_t length_k = k.size(-3);
  if (is_compressed(options) && !options.packing.packed()) {
    length_k = options.seqlen_k->guard_int(__FILE__, __LINE__);
  }
  return lay_out_sequences(q, k, length_k, options.packing, is_compressed(options), options.block_size,
                           options.block_stride);
}

}  // namespace

RangeAttention range_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       const AttentionOptions& options, at::Tensor out, const at::Tensor& lse,
                                       const Gating& gating) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  if (q.numel() == 0 || q.size(-3) == 0) {
    return {out.defined() ? out : at::empty_like(gating.sum), false};
  }
  const SequenceTables tables = sequences_of(q, k, options);
  const at::Tensor q_read = readable(q);
  const at::Tensor k_read = readable(k);
  const at::Tensor v_read = readable(v);
  const bool sums = gating.sum.defined() && is_writable(gating.sum);
  if (!out.defined() && !sums) {
    out = at::empty_like(gating.sum);
  }
  at::Tensor out_written = out.defined() ? writable(out) : out;
  RangeForwardParams params{.sequences = tables.layout,
                            .visibility = visibility_of(options),
                            .compressed = is_compressed(options),
                            .scale = forward_scale(options, q),
                            .q = view_of(q_read),
                            .k = view_of(k_read),
                            .v = view_of(v_read),
                            .out = view_of(out.defined() ? out_written : gating.sum),
                            .lse = rows_of(lse),
                            .num_keys = k.size(-3),
                            .sum = {}};
  if (sums) {
    params.sum = {.gates = gating.gates,
                  .others = {gating.others[0].data_ptr(), gating.others[1].data_ptr()},
                  .out = gating.sum.data_ptr()};
  }
  const RangeForwardPlan plan = plan_range_forward(params, type, current_device());
  if (!plan.takes_sum) {
    params.sum = {};
    if (!out.defined()) {
      out = at::empty_like(gating.sum);
      out_written = writable(out);
      params.out = view_of(out_written);
    }
  } else if (!out.defined()) {
    params.out.data = nullptr;
  }
  launch_range_forward(params, plan, type, c10::cuda::getCurrentCUDAStream());
  if (out.defined()) {
    copy_back(out_written, out);
  }
  fill_unused_rows(options.packing,
                   {{out}, {plan.takes_sum ? gating.sum : at::Tensor()}, {lse, Unused::Value::kNothingSeen}});
  return {out, plan.takes_sum};
}

AttentionGradients range_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const BackwardRows& rows, const GradientMask& wanted,
                                            const AttentionOptions& options, const at::Tensor& grad_q) {
  const ElementType type = element_type("q", q);
  check_head_dims(q, k, v);
  const c10::cuda::CUDAGuard guard(q.device());
  const GradientTensors tensors(grad_out, q, k, v, options.packing, wanted, grad_q);
  if (q.numel() == 0 || k.numel() == 0) {
    return tensors.zeros();
  }
  const SequenceTables tables = sequences_of(q, k, options);
  RangeBackwardParams params{.sequences = tables.layout,
                             .visibility = visibility_of(options),
                             .compressed = is_compressed(options),
                             .scale = static_cast<float>(softmax_scale(options.scale, q.size(-1))),
                             .num_keys = k.size(-3),
                             .splits = 1,
                             .rows_per_split = 0,
                             .partials = nullptr};
  tensors.tell(params);
  rows.tell(params);
  const RangeBackwardPlan plan = plan_range_backward(params, type, current_device(), tensors.needed());
  const at::Tensor partials = at::empty({plan.splits.partial_floats}, q.options().dtype(at::kFloat));
  params.splits = plan.splits.splits;
  params.rows_per_split = plan.splits.rows_per_split;
  params.partials = plan.splits.partial_floats > 0 ? partials.mutable_data_ptr<float>() : nullptr;
  launch_range_backward(params, plan, type, c10::cuda::getCurrentCUDAStream());
  return tensors.finish();
}

}  // namespace nsa::cuda
