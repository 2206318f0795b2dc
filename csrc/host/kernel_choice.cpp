#include "host/kernel_choice.h"

#include <algorithm>
#include <stdexcept>

#include "attention/cpu_chunks.h"
#include "common/geometry.h"
#include "selected/cpu_block_lists.h"

namespace nsa {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) {
    throw std::invalid_argument(message);
  }
}

std::string computed_in(const std::string& dtype) { return dtype == "float64" ? "float64" : "float32"; }

KernelChoice choose_cpu_kernel(const KernelQuery& query) {
  const std::string type = computed_in(query.dtype);
  const int64_t group = query.num_heads / query.num_kv_heads;
  const std::string products = ", products by ATen's BLAS in " + type;
  if (query.op == "compress") {
    return {"phi_aten_" + type,
            "one product of all stride-d chunks with the split weight, then shift and add" + products};
  }
  if (query.op == "selected_attention") {
    const int64_t blocks = ceil_div(query.num_keys, query.select_size);
    const int64_t tokens = cpu::tokens_per_selected_tile(group, blocks, query.num_selected);
    return {"cpu_selected_" + type, "tiles of " + std::to_string(tokens) + " queries, so that a block of " +
                                        std::to_string(blocks) + " meets about " + std::to_string(cpu::kRowsWanted) +
                                        " rows at once" + products};
  }
  if (query.op == "nsa_attention") {
    return {"composition",
            "the kernels of compressed_attention, select_blocks, selected_attention and window_attention"};
  }
  const std::string name = query.op == "select_blocks" ? "cpu_select_" : "cpu_range_";
  return {name + type, "tiles of " + std::to_string(cpu::tokens_per_tile(group)) + " queries by chunks of " +
                           std::to_string(cpu::kKeysPerChunk) + " keys" + products};
}

KernelChoice choose_cuda_kernel(const KernelQuery& query) {
  require(query.dtype != "float64", "dtype must be float16, bfloat16 or float32 on cuda, got float64");
#if defined(NSA_CUDA_VERSION)
  if (query.op == "nsa_attention") {
    return {
        "composition",
        "the kernels of compressed_attention, select_blocks, selected_attention and window_attention; the gates are "
        "applied by the window's kernel on compute capability 9.0 where tensors suit it, else by one of their own"};
  }
  if (query.op == "compress") {
    return {"phi_cublas_" + query.dtype,
            "one product of all stride-d chunks with the split weight by cuBLAS, then a kernel that shifts, adds and "
            "activates"};
  }
  const std::string name = query.op == "select_blocks"        ? "select_"
                           : query.op == "selected_attention" ? "selected_"
                                                              : "range_";
  if (query.dtype == "float32") {
    return {name + "plain", "float32 is computed without tensor cores, whose float32 is not exact"};
  }
  const int64_t group = query.num_heads / query.num_kv_heads;
  const std::string heads = std::to_string(group) + " heads of a group";
  const std::string rows = query.op == "selected_attention"
                               ? "a query with " + heads +
                                     " fills the rows of an instruction: " + std::to_string(ceil_div(group, 16)) +
                                     " of 16"
                               : "rows are queries times the " + heads;
  const std::string products =
      "tensor cores by mma.sync, or on compute capability 9.0 by wgmma where tensors suit it; ";
  return {name + "sm80_" + query.dtype, products + rows};
#else
  if (query.op == "nsa_attention") {
    return choose_cpu_kernel(query);
  }
  return {"cpu_fallback", "this build has no CUDA kernels: tensors are copied to the CPU and back"};
#endif
}

}  // namespace

std::vector<std::string> ops_with_kernels() {
  return {"compress",           "compressed_attention", "select_blocks",
          "selected_attention", "window_attention",     "nsa_attention"};
}

KernelChoice choose_kernel(const KernelQuery& query) {
  const std::vector<std::string> ops = ops_with_kernels();
  std::string names;
  for (const std::string& op : ops) {
    names += (names.empty() ? "" : ", ") + op;
  }
  require(std::find(ops.begin(), ops.end(), query.op) != ops.end(), "op must be one of " + names + ", got " + query.op);
  require(query.dtype == "float16" || query.dtype == "bfloat16" || query.dtype == "float32" || query.dtype == "float64",
          "dtype must be float16, bfloat16, float32 or float64, got " + query.dtype);
  require(query.num_kv_heads >= 1 && query.num_heads >= 1 && query.num_heads % query.num_kv_heads == 0,
          "num_heads must be a multiple of num_kv_heads, got " + std::to_string(query.num_heads) + " and " +
              std::to_string(query.num_kv_heads));
  require(query.num_keys >= 0, "num_keys must be at least 0, got " + std::to_string(query.num_keys));
  require(query.select_size >= 1 && query.num_selected >= 1, "select_size and num_selected must be at least 1, got " +
                                                                 std::to_string(query.select_size) + " and " +
                                                                 std::to_string(query.num_selected));
  if (query.device == "cpu") {
    return choose_cpu_kernel(query);
  }
  require(query.device == "cuda", "device must be cpu or cuda, got " + query.device);
  return choose_cuda_kernel(query);
}

}  // namespace nsa
