// Which kernels a call runs, and why: every branch's plan, asked without tensors. No torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/tiles.h"

namespace nsa {

struct KernelQuery {
  std::string op;  // a name of library.cpp, such as "selected_attention"
  std::string device = "cpu";
  std::string dtype = "float32";
  bool backward = false;
  std::vector<std::string> gradients;    // the inputs of the op whose gradients a backward computes; none: all
  std::pair<int, int> capability{8, 0};  // of a GPU
  int64_t batch = 1;
  int64_t num_heads = 1;
  int64_t num_kv_heads = 1;
  int64_t head_dim = 128;
  int64_t v_head_dim = 128;
  int64_t num_queries = 1;
  int64_t num_keys = 1;
  int64_t block_size = 32;
  int64_t block_stride = 16;
  int64_t select_size = 64;
  int64_t num_selected = 16;
  int64_t window = 512;
  // Of compress.
  std::string compression = "mlp";  // with w1 and w2; "linear": w1 alone; "mean": no weights
  int64_t hidden_size = 256;        // rows of w1 of an mlp
  bool per_head = false;            // whether each KV head has weights of its own
};

// Whether a backward computes the gradient of the op's input of this name.
bool wants(const KernelQuery& query, const std::string& input);

// A kernel that a call launches, by the name that a profile shows; on the CPU, what computes it.
struct ReportedLaunch {
  std::string kernel;
  KernelTile tile;
  int64_t count = 1;  // launches of it
};

struct KernelReport {
  std::vector<ReportedLaunch> launches;  // in their order
  std::string reason;
  int32_t splits = 1;           // that the rows of a tile of keys are cut into, backward
  int64_t workspace_bytes = 0;  // beside the results
};

// Throws std::invalid_argument naming the field and what is allowed.
KernelReport which_kernel(const KernelQuery& query);

// The ops that which_kernel knows.
std::vector<std::string> ops_with_kernels();

}  // namespace nsa
