#include "plans/which_kernel.h"

#include <algorithm>
#include <stdexcept>

#include "common/build_info.h"
#include "common/dispatch.h"
#include "decode/tiles.h"
#include "plans/reports.h"
#include "selection/params.h"

namespace nsa {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) {
    throw std::invalid_argument(message);
  }
}

void require_one_of(const std::string& name, const std::string& value, const std::vector<std::string>& allowed) {
  std::string names;
  for (const std::string& each : allowed) {
    names += (names.empty() ? "" : ", ") + each;
  }
  require(std::find(allowed.begin(), allowed.end(), value) != allowed.end(),
          name + " must be one of " + names + ", got " + value);
}

void require_between(const std::string& name, int64_t value, int64_t least, int64_t most) {
  require(value >= least && value <= most, name + " must lie between " + std::to_string(least) + " and " +
                                               std::to_string(most) + ", got " + std::to_string(value));
}

// The inputs of an op that have gradients.
std::vector<std::string> differentiable_inputs(const std::string& op) {
  if (op == "nsa_attention") {
    return {"q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"};
  }
  if (op == "compress") {
    return {"x", "pe", "w1", "b1", "w2", "b2"};
  }
  if (op == "rotate") {
    return {"x"};
  }
  return op == "compressed_attention" ? std::vector<std::string>{"q", "k_cmp", "v_cmp"}
                                      : std::vector<std::string>{"q", "k", "v"};
}

// What the ops refuse on CUDA, so that no plan is asked about it.
void check_cuda_limits(const KernelQuery& query) {
  constexpr int64_t kMost = 0x7fffffff;
  const bool decodes = query.op == "nsa_attention_with_kvcache";
  const bool chooses = query.op == "select_blocks" || query.op == "nsa_attention" || decodes;
  if (chooses) {
    require_between("num_selected", query.num_selected, 1, kMostSelected);
    require_between("block_size / block_stride", query.block_size / query.block_stride, 1, kMostPieces);
    require_between("select_size / block_stride", query.select_size / query.block_stride, 1, kMostPieces);
    const int64_t most_heads = query.dtype == "float32" || decodes ? kMost : kMostHeads;
    require_between("num_heads / num_kv_heads", query.num_heads / query.num_kv_heads, 1, most_heads);
  }
  require_between("num_queries", query.num_queries, 0, decodes ? kMostDecodeQueries : kMost);
  require_between("num_queries * batch", query.num_queries * query.batch, 0, kMost);
  require_between("num_keys * batch", query.num_keys * query.batch, 0, kMost);
  const int64_t lists = query.num_queries * query.batch * query.num_kv_heads;  // below 2^51
  require_between("num_selected", query.num_selected, 1, lists == 0 ? kMost : std::max<int64_t>(kMost / lists, 1));
  require(lists <= kMost,
          "num_kv_heads must leave fewer than 2^31 lists of blocks, got " + std::to_string(query.num_kv_heads));
}

void check(const KernelQuery& query) {
  constexpr int64_t kMost = 0x7fffffff;
  require_one_of("op", query.op, ops_with_kernels());
  require_one_of("device", query.device, {"cpu", "cuda"});
  require_one_of("compression", query.compression, {"mlp", "linear", "mean"});
  require_one_of("dtype", query.dtype, {"float16", "bfloat16", "float32", "float64"});
  require(query.num_kv_heads >= 1 && query.num_heads >= 1 && query.num_heads % query.num_kv_heads == 0,
          "num_heads must be a multiple of num_kv_heads, got " + std::to_string(query.num_heads) + " and " +
              std::to_string(query.num_kv_heads));
  require_between("num_heads", query.num_heads, 1, 1 << 20);
  const int64_t most_width = query.device == "cuda" ? kLargestHeadDim : kMost;
  require_between("head_dim", query.head_dim, 1, most_width);
  require_between("v_head_dim", query.v_head_dim, 1, most_width);
  require_between("batch", query.batch, 1, 1 << 20);
  require_between("num_keys", query.num_keys, 0, kMost);
  require_between("num_queries", query.num_queries, 0, kMost);
  for (const auto& [name, value] : {std::pair{"block_size", query.block_size},
                                    {"block_stride", query.block_stride},
                                    {"select_size", query.select_size},
                                    {"num_selected", query.num_selected},
                                    {"window", query.window},
                                    {"hidden_size", query.hidden_size}}) {
    require_between(name, value, 1, kMost);
  }
  require(query.device == "cpu" || query.dtype != "float64",
          "dtype must be float16, bfloat16 or float32 on cuda, got float64");
  require(query.device == "cpu" || query.capability.first >= 8, "capability must be (8, 0) or newer, got (" +
                                                                    std::to_string(query.capability.first) + ", " +
                                                                    std::to_string(query.capability.second) + ")");
  if (query.device == "cuda") {
    check_cuda_limits(query);
  }
  require(!query.backward || (query.op != "select_blocks" && query.op != "nsa_attention_with_kvcache"),
          "backward must be False for " + query.op + ", got True");
  require(query.backward || query.gradients.empty(), "gradients must come with backward, got them without");
  for (const std::string& input : query.gradients) {
    require_one_of("gradients", input, differentiable_inputs(query.op));
  }
}

}  // namespace

bool wants(const KernelQuery& query, const std::string& input) {
  const std::vector<std::string>& wanted = query.gradients;
  return query.backward && (wanted.empty() || std::find(wanted.begin(), wanted.end(), input) != wanted.end());
}

std::vector<std::string> ops_with_kernels() {
  return {"compress",           "rotate",           "compressed_attention", "select_blocks",
          "selected_attention", "window_attention", "nsa_attention",        "nsa_attention_with_kvcache"};
}

KernelReport which_kernel(const KernelQuery& query) {
  check(query);
  return query.device == "cpu" ? cpu_report(query) : cuda_report(query);
}

}  // namespace nsa
