// What runs on a GPU: calls of these shapes with contiguous tensors, given to the plans.
#include <algorithm>

#include "common/build_info.h"
#include "plans/reports.h"
#include "range/plan.h"
#include "selected/plan.h"
#include "selection/plan.h"

namespace nsa {
namespace {

constexpr const char* kSuffixes[] = {"_plain", "_sm80", "_sm90"};

std::string named(const std::string& kernel, const KernelChoice& choice) {
  return kernel + kSuffixes[static_cast<int>(choice.machine)];
}

// Why both kernels of a backward.
std::string joined(const KernelChoice& query, const KernelChoice& keys) {
  if (query.machine == keys.machine) {
    return keys.why;
  }
  return std::string("of the gradient of q: ") + query.why + "; of those of k and v: " + keys.why;
}

ElementType element_type(const KernelQuery& query) {
  return query.dtype == "float32"   ? ElementType::kFloat32
         : query.dtype == "float16" ? ElementType::kFloat16
                                    : ElementType::kBFloat16;
}

// A GPU of this capability, of the kind that has most multiprocessors.
Device device_of(const std::pair<int, int>& capability) {
  const auto [major, minor] = capability;
  struct Model {
    int major, minor, multiprocessors;
    int64_t shared_kilobytes;
  };
  constexpr Model kModels[] = {{8, 0, 108, 163},  {8, 6, 84, 99},   {8, 7, 16, 163},
                               {8, 9, 142, 99},   {9, 0, 132, 227}, {10, 0, 148, 227},
                               {10, 3, 148, 227}, {12, 0, 170, 99}, {12, 1, 48, 99}};
  const auto* const found = std::find_if(std::begin(kModels), std::end(kModels),
                                         [&](const Model& m) { return m.major == major && m.minor == minor; });
  const Model model = found != std::end(kModels) ? *found : Model{major, minor, 108, 99};
  const bool hopper = major == 9 && minor == 0;
  const char* no_sm90 = !hopper                   ? "the GPU is not of compute capability 9.0"
                        : portable_kernels_only() ? "NSA_TORCH_KERNELS=portable"
                        : !build_info().cuda.empty() && !holds_kernels("sm90a")
                            ? "the build has no kernels for compute capability 9.0a"
                            : nullptr;
  return {major, minor, model.multiprocessors, model.shared_kilobytes * 1024, no_sm90};
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
    const KernelChoice kernel = range_forward(query, device, compressed, false).kernel;
    const bool plain = kernel.machine == Machine::kPlain;
    return {{plain ? "forward_plain" : named("range_forward", kernel)}, kernel.why};
  }
  RangeBackwardParams params{};
  set_tensors(params, query, keys_of(query, compressed));
  params.visibility = visibility_of(query, compressed);
  params.compressed = compressed;
  params.grad_out = contiguous(query.num_queries, query.num_heads, query.v_head_dim);
  params.num_keys = keys_of(query, compressed);
  const RangeBackwardPlan plan = plan_range_backward(params, element_type(query), device);
  if (plan.keys.machine == Machine::kPlain) {
    return {{"backward_query_plain", "backward_keys_plain"}, plan.keys.why};
  }
  KernelReport report{{named("range_backward_query", plan.query), named("range_backward_keys", plan.keys)},
                      joined(plan.query, plan.keys),
                      plan.splits.splits,
                      plan.splits.partial_floats * 4};
  if (plan.splits.splits > 1) {
    report.kernels.push_back(named("range_add_partials", plan.keys));
  }
  return report;
}

KernelReport selected_report(const KernelQuery& query, const Device& device) {
  if (!query.backward) {
    SelectedForwardParams params{};
    set_tensors(params, query, query.num_keys);
    params.select_size = static_cast<int32_t>(query.select_size);
    params.num_selected = static_cast<int32_t>(query.num_selected);
    const SelectedForwardPlan plan = plan_selected_forward(params, element_type(query), device);
    const bool plain = plan.kernel.machine == Machine::kPlain;
    return {{plain ? "forward_plain" : named("selected_forward", plan.kernel)}, plan.kernel.why};
  }
  SelectedBackwardParams params{};
  set_tensors(params, query, query.num_keys);
  params.select_size = static_cast<int32_t>(query.select_size);
  params.num_selected = static_cast<int32_t>(query.num_selected);
  params.chosen_by.blocks = query.batch * ceil_div(query.num_keys, query.select_size) * query.num_kv_heads;
  params.grad_out = contiguous(query.num_queries, query.num_heads, query.v_head_dim);
  const SelectedBackwardPlan plan = plan_selected_backward(params, element_type(query), device);
  if (plan.keys.machine == Machine::kPlain) {
    return {{"backward_query_plain", "backward_keys_plain"}, plan.keys.why};
  }
  const std::string keys = named("selected_backward_keys", plan.keys);
  const int64_t bytes = plan.handed_bytes + plan.partial_floats * 4;
  if (plan.handed_heads > 0) {
    return {{keys, "selected_query_handed_sm90"}, plan.keys.why, 1, bytes};
  }
  return {{named("selected_backward_query", plan.query), keys}, joined(plan.query, plan.keys), 1, bytes};
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
  return {{named("select_blocks", plan.kernel)}, plan.kernel.why};
}

void append(std::vector<std::string>& to, const std::vector<std::string>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

// The three branches, the choice, and the gates.
KernelReport whole_report(const KernelQuery& query, const Device& device) {
  KernelReport report = range_report(query, device, true);
  const KernelReport selected = selected_report(query, device);
  const KernelReport window = range_report(query, device, false);
  if (!query.backward) {
    append(report.kernels, select_report(query, device).kernels);
  } else {
    report.kernels.insert(report.kernels.begin(), "gate_gradients");
  }
  append(report.kernels, selected.kernels);
  append(report.kernels, window.kernels);
  if (!query.backward && !range_forward(query, device, false, true).takes_sum) {
    report.kernels.emplace_back("combine_gates");
  }
  report.reason = "of the compressed branch: " + report.reason + "; of the selected one: " + selected.reason;
  report.workspace_bytes = max_of(report.workspace_bytes, max_of(selected.workspace_bytes, window.workspace_bytes));
  return report;
}

KernelReport compress_report(const KernelQuery& query) {
  const std::vector<std::string> forward{"gather_chunks", "shift_and_add"};
  const std::vector<std::string> backward{"gather_chunks", "shift_and_spread", "scatter_chunks"};
  return {query.backward ? backward : forward,
          "one product of all stride-d chunks with the split weight by cuBLAS, between kernels that gather, shift, add "
          "and activate; without weights a kernel that takes the mean"};
}

}  // namespace

KernelReport cuda_report(const KernelQuery& query) {
  const Device device = device_of(query.capability);
  if (query.op == "compress") {
    return compress_report(query);
  }
  if (query.op == "rotate") {
    return {{"rotate_pairs"}, "one kernel, its own backward"};
  }
  if (query.op == "select_blocks") {
    return select_report(query, device);
  }
  if (query.op == "selected_attention") {
    return selected_report(query, device);
  }
  if (query.op == "nsa_attention") {
    return whole_report(query, device);
  }
  return range_report(query, device, query.op == "compressed_attention");
}

}  // namespace nsa
