// What runs on a GPU: calls of these shapes with contiguous tensors, given to the plans.
#include <stdexcept>
#include <utility>

#include "gates/tiles.h"
#include "plans/reports.h"
#include "range/plan.h"
#include "selected/plan.h"
#include "selection/plan.h"

namespace nsa {
namespace {

// Why the kernels of a backward.
std::string joined(const KernelChoice& query, const KernelChoice& keys, NeededGradients needed) {
  if (!needed.query || !needed.keys || query.machine == keys.machine) {
    return needed.keys ? keys.why : query.why;
  }
  return std::string("of the gradient of q: ") + query.why + "; of those of k and v: " + keys.why;
}

// Contiguous, where nothing is read or written.
TensorView contiguous(int64_t tokens, int64_t heads, int64_t width) {
  alignas(256) static char nowhere[256];
  const int64_t padded = ceil_div(width, 8) * 8;  // other widths are padded for kernels of 16-bit elements
  return {nowhere, tokens * heads * padded, heads * padded, padded, static_cast<int32_t>(padded)};
}

SequenceLayout layout_of(const KernelQuery& query) {
  SequenceLayout s{};
  s.batch = static_cast<int32_t>(query.batch);
  s.heads_kv = static_cast<int32_t>(query.num_kv_heads);
  s.group = static_cast<int32_t>(query.num_heads / query.num_kv_heads);
  s.by_group = Divisor(static_cast<uint32_t>(s.group));
  s.length_q = query.num_queries;
  s.length_k = query.num_keys;
  s.offset = default_offset(s.length_q, s.length_k);
  return s;
}

Visibility visibility_of(const KernelQuery& query, bool compressed) {
  if (compressed) {
    return {static_cast<int32_t>(query.block_stride), static_cast<int32_t>(query.block_size - 1), Visibility::kNoWindow,
            Divisor(static_cast<uint32_t>(query.block_stride))};
  }
  return {1, 0, static_cast<int32_t>(min_of(query.window, Visibility::kNoWindow)), Divisor(1)};
}

template <typename Params>
void set_tensors(Params& params, const KernelQuery& query, int64_t num_keys) {
  params.sequences = layout_of(query);
  params.scale = 1.f;
  params.q = contiguous(query.num_queries, query.num_heads, query.head_dim);
  params.k = contiguous(num_keys, query.num_kv_heads, query.head_dim);
  params.v = contiguous(num_keys, query.num_kv_heads, query.v_head_dim);
}

int64_t keys_of(const KernelQuery& query, bool compressed) {
  return compressed ? num_compressed_blocks(query.num_keys, query.block_size, query.block_stride) : query.num_keys;
}

// What is asked for of the inputs of a branch, which is the whole op or a part of nsa_attention.
NeededGradients needed_of(const KernelQuery& query, const std::string& branch) {
  const bool part = query.op == "nsa_attention";
  const std::string suffix = branch == "compressed_attention" ? "_cmp"
                             : !part                          ? ""
                             : branch == "selected_attention" ? "_slc"
                                                              : "_win";
  return {.query = wants(query, "q"), .keys = wants(query, "k" + suffix) || wants(query, "v" + suffix)};
}

RangeForwardPlan range_forward(const KernelQuery& query, const Device& device, bool compressed, bool with_sum) {
  RangeForwardParams params{};
  set_tensors(params, query, keys_of(query, compressed));
  params.visibility = visibility_of(query, compressed);
  params.compressed = compressed;
  params.out = contiguous(query.num_queries, query.num_heads, query.v_head_dim);
  params.num_keys = keys_of(query, compressed);
  params.sum.out = with_sum ? params.out.data : nullptr;
  return plan_range_forward(params, element_type(query), device);
}

KernelReport range_report(const KernelQuery& query, const Device& device, bool compressed) {
  if (!query.backward) {
    const RangeForwardPlan plan = range_forward(query, device, compressed, false);
    return report_of(plan.launches, plan.kernel.why);
  }
  RangeBackwardParams params{};
  set_tensors(params, query, keys_of(query, compressed));
  params.visibility = visibility_of(query, compressed);
  params.compressed = compressed;
  params.grad_out = contiguous(query.num_queries, query.num_heads, query.v_head_dim);
  params.num_keys = keys_of(query, compressed);
  const NeededGradients needed = needed_of(query, compressed ? "compressed_attention" : "window_attention");
  const RangeBackwardPlan plan = plan_range_backward(params, element_type(query), device, needed);
  KernelReport report = report_of(plan.launches, joined(plan.query, plan.keys, needed));
  report.splits = plan.splits.splits;
  report.workspace_bytes = plan.splits.partial_floats * 4;
  return report;
}

// What the op refuses.
void check_lists_fit(const KernelQuery& query, const Device& device) {
  const int64_t most = most_listed(query.head_dim, query.v_head_dim, element_type(query), device);
  if (query.num_selected > most) {
    throw std::invalid_argument("num_selected must be at most " + std::to_string(most) +
                                " for these head dimensions and " + std::to_string(device.shared_bytes) +
                                " bytes of shared memory for a block of threads, got " +
                                std::to_string(query.num_selected));
  }
}

KernelReport selected_report(const KernelQuery& query, const Device& device) {
  check_lists_fit(query, device);
  if (!query.backward) {
    SelectedForwardParams params{};
    set_tensors(params, query, query.num_keys);
    params.select_size = static_cast<int32_t>(query.select_size);
    params.num_selected = static_cast<int32_t>(query.num_selected);
    const SelectedForwardPlan plan = plan_selected_forward(params, element_type(query), device);
    return report_of(plan.launches, plan.kernel.why);
  }
  SelectedBackwardParams params{};
  set_tensors(params, query, query.num_keys);
  params.select_size = static_cast<int32_t>(query.select_size);
  params.num_selected = static_cast<int32_t>(query.num_selected);
  params.chosen_by.blocks = query.batch * ceil_div(query.num_keys, query.select_size) * query.num_kv_heads;
  params.grad_out = contiguous(query.num_queries, query.num_heads, query.v_head_dim);
  const NeededGradients needed = needed_of(query, "selected_attention");
  const SelectedBackwardPlan plan = plan_selected_backward(params, element_type(query), device, needed);
  KernelReport report =
      report_of(plan.launches, plan.handed_heads > 0 ? plan.keys.why : joined(plan.query, plan.keys, needed));
  report.workspace_bytes = plan.handed_bytes + plan.partial_floats * 4;
  return report;
}

KernelReport select_report(const KernelQuery& query, const Device& device) {
  SelectBlocksParams params{};
  const int64_t num_keys = keys_of(query, true);
  params.sequences = layout_of(query);
  params.num_selected = static_cast<int32_t>(query.num_selected);
  params.q = contiguous(query.num_queries, query.num_heads, query.head_dim);
  params.k = contiguous(num_keys, query.num_kv_heads, query.head_dim);
  params.num_keys = num_keys;
  const SelectBlocksPlan plan = plan_select_blocks(params, element_type(query), device);
  return report_of(plan.launches, plan.kernel.why);
}

void append(KernelReport& to, const KernelReport& more) {
  to.launches.insert(to.launches.end(), more.launches.begin(), more.launches.end());
  to.workspace_bytes = max_of(to.workspace_bytes, more.workspace_bytes);
}

// Nothing is launched for gradients of no keys.
KernelReport branch_report(const KernelQuery& query, const Device& device, const std::string& branch) {
  const bool compressed = branch == "compressed_attention";
  if (query.num_queries == 0 || (query.backward && keys_of(query, compressed) == 0)) {
    return {{}, "there are no queries or no keys: nothing is computed"};
  }
  const NeededGradients needed = needed_of(query, branch);
  if (query.backward && !needed.query && !needed.keys) {
    return {{}, "none of its gradients is asked for"};
  }
  return branch == "selected_attention" ? selected_report(query, device) : range_report(query, device, compressed);
}

// A branch's op: its backward first takes <dO, out>.
KernelReport op_report(const KernelQuery& query, const Device& device, const std::string& branch) {
  KernelReport report = branch_report(query, device, branch);
  if (query.backward && query.num_queries > 0) {
    report.launches.insert(report.launches.begin(), {"delta", gate_tiles::kDelta});
  }
  return report;
}

// The three branches, the choice, and the gates.
KernelReport whole_report(const KernelQuery& query, const Device& device) {
  const KernelReport compressed = branch_report(query, device, "compressed_attention");
  const KernelReport selected = branch_report(query, device, "selected_attention");
  KernelReport report{{},
                      "of the compressed branch: " + compressed.reason + "; of the selected one: " + selected.reason,
                      compressed.splits};
  if (query.num_queries == 0) {
    return report;
  }
  if (query.backward) {
    report.launches.push_back({"gate_gradients", gate_tiles::kGradients});
  }
  append(report, compressed);
  if (!query.backward) {
    append(report, select_report(query, device));
  }
  append(report, selected);
  append(report, branch_report(query, device, "window_attention"));
  if (!query.backward && !range_forward(query, device, false, true).takes_sum) {
    report.launches.push_back({"combine_gates", gate_tiles::kCombine});
  }
  return report;
}

}  // namespace

KernelReport cuda_report(const KernelQuery& query) {
  const Device device = device_of(query.capability);
  if (query.op == "compress") {
    return compress_report(query);
  }
  if (query.op == "rotate") {
    return {{{"rotate_pairs", {}}}, "one kernel, its own backward"};
  }
  if (query.op == "select_blocks") {
    return select_report(query, device);
  }
  if (query.op == "nsa_attention") {
    return whole_report(query, device);
  }
  if (query.op == "nsa_attention_with_kvcache") {
    return decode_report(query, device);
  }
  return op_report(query, device, query.op);
}

}  // namespace nsa
