// Checks of arguments that the ops share. They read sizes as SymInts, so the same code serves real and symbolic
// tensors, and they raise ValueError (sizes, options) or TypeError (dtype, device) naming the argument before any
// kernel starts.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

#include "host/packing.h"

namespace nsa {

// The most that a number of keys, blocks or heads may be: sums and products of two of them are far from overflow, and
// the CUDA kernels count in 32 bits.
constexpr int64_t kLargestSize = 0x7fffffff;
constexpr double kLargestScale = 1e30;

// q, k and v of one branch; the names are those the caller used, for the messages.
struct AttentionNames {
  const char* q = "q";
  const char* k = "k";
  const char* v = "v";
};

// float16, bfloat16, float32 or float64.
void check_floating(const char* name, const at::Tensor& tensor);

// Same device, and for check_like the same dtype, as the tensor called `other_name`.
void check_same_device(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other);
void check_like(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other);

// `tensor` has exactly this shape; `meaning` spells it, such as "(B, Tq, Hq, 3)".
void check_shape(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef shape, const char* meaning);

// A softmax scale whose scores float32 can hold, or none.
void check_scale(const std::optional<double>& scale);

// An int32 vector of B + 1 cumulative lengths on `like`'s device.
void check_cumulative_vector(const char* name, const at::Tensor& lengths, const char* like_name,
                             const at::Tensor& like);

// Within `least` and kLargestSize.
void check_size(const char* name, int64_t value, int64_t least);

// A window of at least 1. Any length is: one that reaches past the first key sees all of them.
void check_window_length(const c10::SymInt& window);

// An upper bound of lengths, where one is given, at least 0; of a symbol nothing is asked.
void check_maximum(const char* name, const std::optional<c10::SymInt>& maximum);

// block_stride divides block_size, and select_size when it is given.
void check_block_sizes(int64_t block_size, int64_t block_stride, std::optional<int64_t> select_size = std::nullopt);

// Budget of blocks per query: n >= forced blocks, n >= 1.
void check_block_budget(int64_t num_selected, int64_t num_initial, int64_t num_local);

// cu_seqlens_* both or neither, seqused_k only with them, int32 vectors of matching length on `like`'s device.
void check_packing(const Packing& packing, const char* like_name, const at::Tensor& like);

// Dimensions, dtypes, devices, heads and batch of q and k; for v see check_values.
void check_queries_keys(const at::Tensor& q, const at::Tensor& k, const Packing& packing, const AttentionNames& names);
void check_values(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionNames& names);

// No more queries than keys in a dense call.
void check_query_length(const at::Tensor& q, const c10::SymInt& seqlen_k, const char* q_name, const char* k_name,
                        const Packing& packing);

// k_cmp holds the blocks of seqlen_k keys. Returns seqlen_k (the number of packed slots' keys is not known: 0 then).
void check_compressed_length(const at::Tensor& q, const at::Tensor& k_cmp, const std::optional<c10::SymInt>& seqlen_k,
                             int64_t block_size, int64_t block_stride, const Packing& packing);

// block_indices is int32 of shape (B, Tq, Hkv, n).
void check_block_indices(const at::Tensor& block_indices, const at::Tensor& q, const at::Tensor& k);

// Shapes of results: (B, Hq, Tq) or (Hq, sum Tq), and its dtype.
c10::SymDimVector lse_shape(const at::Tensor& q);
at::ScalarType lse_dtype(const at::Tensor& q);

// grad_out, out and lse of a backward call.
void check_backward(const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& q,
                    const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse);

}  // namespace nsa
