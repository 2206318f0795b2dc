// What runs on the CPU.
#include "common/cpu_tiles.h"
#include "common/geometry.h"
#include "plans/reports.h"

namespace nsa {

KernelReport cpu_report(const KernelQuery& query) {
  const std::string type = query.dtype == "float64" ? "float64" : "float32";
  const int64_t group = query.num_heads / query.num_kv_heads;
  const std::string products = ", products by ATen's BLAS in " + type;
  if (query.op == "rotate") {
    return {{{"aten", {}}}, "composed of ATen's ops"};
  }
  if (query.op == "compress") {
    return {{{"phi_aten_" + type, {}}},
            "one product of all stride-d chunks with the split weight, then shift and add" + products};
  }
  if (query.op == "selected_attention") {
    const int64_t blocks = ceil_div(query.num_keys, query.select_size);
    const int64_t tokens = cpu::tokens_per_selected_tile(group, blocks, query.num_selected);
    return {{{"cpu_selected_" + type, {}}},
            "tiles of " + std::to_string(tokens) + " queries, so that a block of " + std::to_string(blocks) +
                " meets about " + std::to_string(cpu::kRowsWanted) + " rows at once" + products};
  }
  if (query.op == "nsa_attention_with_kvcache") {
    return {{{"cpu_decode_" + type, {}}}, "a task for each query and KV head, in " + type};
  }
  if (query.op == "nsa_attention") {
    return {{{"composition", {}}},
            "the kernels of compressed_attention, select_blocks, selected_attention and window_attention"};
  }
  const std::string name = query.op == "select_blocks" ? "cpu_select_" : "cpu_range_";
  return {{{name + type, {}}},
          "tiles of " + std::to_string(cpu::tokens_per_tile(group)) + " queries by chunks of " +
              std::to_string(cpu::kKeysPerChunk) + " keys" + products};
}

}  // namespace nsa
