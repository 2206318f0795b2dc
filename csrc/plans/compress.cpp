// What compress runs on a GPU.
#include <optional>
#include <string>

#include "compression/plan.h"
#include "plans/reports.h"

namespace nsa {
namespace {

// Of the gradients of a backward; a forward has none.
std::optional<PhiMask> mask_of(const KernelQuery& query, Phi phi) {
  if (!query.backward) {
    return std::nullopt;
  }
  const bool first = phi != Phi::kMean;
  const bool second = phi == Phi::kMlp;
  return PhiMask{.x = wants(query, "x"),
                 .pe = first && wants(query, "pe"),
                 .w1 = first && wants(query, "w1"),
                 .b1 = first && wants(query, "b1"),
                 .w2 = second && wants(query, "w2"),
                 .b2 = second && wants(query, "b2")};
}

}  // namespace

KernelReport compress_report(const KernelQuery& query) {
  const int64_t blocks = num_compressed_blocks(query.num_keys, query.block_size, query.block_stride);
  if (blocks == 0) {
    return {{}, "there are no blocks: nothing is computed"};
  }
  const Phi phi = query.compression == "mlp" ? Phi::kMlp : query.compression == "linear" ? Phi::kLinear : Phi::kMean;
  const CompressSizes sizes{.chunks = query.batch * (blocks + query.block_size / query.block_stride - 1),
                            .blocks = query.batch * blocks,
                            .heads = query.num_kv_heads,
                            .width = query.head_dim,
                            .hidden = phi == Phi::kMlp ? query.hidden_size : query.v_head_dim,
                            .result = query.v_head_dim,
                            .block_size = query.block_size,
                            .block_stride = query.block_stride,
                            .phi = phi,
                            .per_head_1 = query.per_head,
                            .per_head_2 = query.per_head,
                            .packed = false};
  const CompressPlan plan = plan_compress(sizes, element_type(query), mask_of(query, phi));
  KernelReport report = report_of(plan.launches, plan.why);
  if (plan.products > 0) {
    report.reason += "; products: " + std::to_string(plan.products);
  }
  report.workspace_bytes = plan.workspace_bytes;
  return report;
}

}  // namespace nsa
