// Which kernel an op runs for given shapes, and why. No torch: the Python module _C and programs can ask without
// tensors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nsa {

struct KernelQuery {
  std::string op;              // a name of library.cpp, such as "selected_attention"
  std::string device = "cpu";  // "cpu" or "cuda"
  std::string dtype = "float32";
  int64_t num_heads = 1;
  int64_t num_kv_heads = 1;
  int64_t num_keys = 1;
  int64_t select_size = 64;
  int64_t num_selected = 16;
};

struct KernelChoice {
  std::string kernel;
  std::string reason;
};

// Throws std::invalid_argument naming the field and what is allowed.
KernelChoice choose_kernel(const KernelQuery& query);

// The ops that choose_kernel knows.
std::vector<std::string> ops_with_kernels();

}  // namespace nsa
