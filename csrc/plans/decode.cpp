// A decoding step of these shapes, with 16-byte aligned pages of as many tokens as a selection block has.
#include "decode/plan.h"
#include "plans/reports.h"

namespace nsa {
namespace {

TensorView aligned_view(int64_t heads, int64_t width) {
  const auto padded = static_cast<int32_t>(width);
  return {nullptr, heads * width, heads * width, width, padded};
}

PagedRows aligned_rows(int64_t width_k, int64_t width_v) {
  PagedRows rows{};
  rows.aligned = width_k % 8 == 0 && width_v % 8 == 0;
  return rows;
}

}  // namespace

KernelReport decode_report(const KernelQuery& query, const Device& device) {
  if (query.num_queries == 0) {
    return {{}, "there are no queries: nothing is computed"};
  }
  DecodeParams params{};
  params.batch = static_cast<int32_t>(query.batch);
  params.heads_kv = static_cast<int32_t>(query.num_kv_heads);
  params.group = static_cast<int32_t>(query.num_heads / query.num_kv_heads);
  params.queries = static_cast<int32_t>(query.num_queries);
  params.block_size = static_cast<int32_t>(query.block_size);
  params.block_stride = static_cast<int32_t>(query.block_stride);
  params.select_size = static_cast<int32_t>(query.select_size);
  params.num_selected = static_cast<int32_t>(query.num_selected);
  params.window = static_cast<int32_t>(query.window);
  params.max_tokens = static_cast<int32_t>(query.num_keys);
  params.q = aligned_view(query.num_heads, query.head_dim);
  params.out = aligned_view(query.num_heads, query.v_head_dim);
  params.compressed = params.selected = params.windowed = aligned_rows(query.head_dim, query.v_head_dim);
  const DecodePlan plan = plan_decode(params, element_type(query), 0, device);
  KernelReport report = report_of(plan.launches, plan.kernel.why);
  report.workspace_bytes = 4 * (plan.floats + plan.ints);
  return report;
}

}  // namespace nsa
