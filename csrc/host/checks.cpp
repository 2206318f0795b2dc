#include "host/checks.h"

#include <c10/util/Exception.h>

#include <cmath>

#include "common/geometry.h"

namespace nsa {
namespace {

c10::SymInt heads_of(const at::Tensor& tensor) { return tensor.sym_size(-2); }
c10::SymInt tokens_of(const at::Tensor& tensor) { return tensor.sym_size(-3); }

void check_dimensions(const char* name, const at::Tensor& tensor, const Packing& packing) {
  if (packing.packed()) {
    TORCH_CHECK_VALUE(tensor.dim() == 3, name, " must be packed, (sum T, H, D), when cu_seqlens are given, got shape ",
                      tensor.sym_sizes());
  } else {
    TORCH_CHECK_VALUE(tensor.dim() == 4, name, " must be (B, T, H, D), or (sum T, H, D) with cu_seqlens, got shape ",
                      tensor.sym_sizes());
  }
  TORCH_CHECK_VALUE(tensor.sym_size(-1) >= 1 && heads_of(tensor) >= 1, name,
                    " must have at least one head and one channel, got shape ", tensor.sym_sizes());
}

void check_lengths_vector(const char* name, const at::Tensor& lengths, const char* like_name, const at::Tensor& like) {
  TORCH_CHECK_TYPE(lengths.scalar_type() == at::kInt, name, " must be int32, got ", lengths.scalar_type());
  check_same_device(name, lengths, like_name, like);
  TORCH_CHECK_VALUE(lengths.dim() == 1, name, " must be a vector, got shape ", lengths.sym_sizes());
}

}  // namespace

void check_floating(const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
                   " must be float16, bfloat16, float32 or float64, got ", type);
}

void check_same_device(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.device() == other.device(), name, " must be on the device of ", other_name, ", ",
                   other.device(), ", got ", tensor.device());
}

void check_like(const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name, ", ",
                   other.scalar_type(), ", got ", tensor.scalar_type());
  check_same_device(name, tensor, other_name, other);
}

void check_shape(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef shape, const char* meaning) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == shape, name, " must be ", meaning, " = ", shape, ", got shape ",
                    tensor.sym_sizes());
}

void check_scale(const std::optional<double>& scale) {
  TORCH_CHECK_VALUE(!scale.has_value() || std::isfinite(*scale), "scale must be finite, got ", *scale);
  TORCH_CHECK_VALUE(!scale.has_value() || std::abs(*scale) <= kLargestScale, "scale must lie between -", kLargestScale,
                    " and ", kLargestScale, ", got ", *scale);
}

void check_cumulative_vector(const char* name, const at::Tensor& lengths, const char* like_name,
                             const at::Tensor& like) {
  check_lengths_vector(name, lengths, like_name, like);
  TORCH_CHECK_VALUE(lengths.sym_size(0) >= 1, name, " must have B + 1 entries, got none");
  TORCH_CHECK_VALUE(lengths.sym_size(0) > 1 || like.sym_size(0) == 0, name, " must end at the tokens of ", like_name,
                    ", ", like.sym_size(0), ", got no sequence");
}

void check_size(const char* name, int64_t value, int64_t least) {
  TORCH_CHECK_VALUE(value >= least, name, " must be at least ", least, ", got ", value);
  TORCH_CHECK_VALUE(value <= kLargestSize, name, " must be at most ", kLargestSize, ", got ", value);
}

void check_window_length(const c10::SymInt& window) {
  TORCH_CHECK_VALUE(window >= 1, "window must be at least 1, the query's own key, got ", window);
}

void check_maximum(const char* name, const std::optional<c10::SymInt>& maximum) {
  const std::optional<int64_t> known = maximum.has_value() ? maximum->maybe_as_int() : std::nullopt;
  TORCH_CHECK_VALUE(!known.has_value() || *known >= 0, name, " must be at least 0, got ", *known);
}

void check_block_sizes(int64_t block_size, int64_t block_stride, std::optional<int64_t> select_size) {
  check_size("block_size", block_size, 1);
  check_size("block_stride", block_stride, 1);
  TORCH_CHECK_VALUE(block_size % block_stride == 0, "block_stride must divide block_size, got block_stride ",
                    block_stride, " and block_size ", block_size);
  if (select_size.has_value()) {
    check_size("select_size", *select_size, 1);
    TORCH_CHECK_VALUE(*select_size % block_stride == 0, "block_stride must divide select_size, got block_stride ",
                      block_stride, " and select_size ", *select_size);
  }
}

void check_block_budget(int64_t num_selected, int64_t num_initial, int64_t num_local) {
  check_size("num_selected", num_selected, 1);
  check_size("num_initial", num_initial, 0);
  check_size("num_local", num_local, 0);
  TORCH_CHECK_VALUE(num_selected >= num_initial + num_local,
                    "num_selected must be at least num_initial + num_local, the forced blocks, got num_selected ",
                    num_selected, ", num_initial ", num_initial, ", num_local ", num_local);
}

void check_packing(const Packing& packing, const char* like_name, const at::Tensor& like) {
  check_maximum("max_seqlen_q", packing.max_seqlen_q);
  check_maximum("max_seqlen_k", packing.max_seqlen_k);
  TORCH_CHECK_VALUE(packing.cu_seqlens_q.has_value() == packing.cu_seqlens_k.has_value(),
                    "cu_seqlens_q and cu_seqlens_k must be given together, got only cu_seqlens_",
                    packing.cu_seqlens_q.has_value() ? "q" : "k");
  TORCH_CHECK_VALUE(packing.packed() || !packing.seqused_k.has_value(),
                    "seqused_k must come with cu_seqlens_q and cu_seqlens_k, got it alone");
  if (!packing.packed()) {
    return;
  }
  check_cumulative_vector("cu_seqlens_q", *packing.cu_seqlens_q, like_name, like);
  check_cumulative_vector("cu_seqlens_k", *packing.cu_seqlens_k, like_name, like);
  const c10::SymInt size = packing.cu_seqlens_k->sym_size(0);
  TORCH_CHECK_VALUE(packing.cu_seqlens_q->sym_size(0) == size,
                    "cu_seqlens_q must have as many entries as cu_seqlens_k, ", size, ", got ",
                    packing.cu_seqlens_q->sym_size(0));
  if (packing.seqused_k.has_value()) {
    check_lengths_vector("seqused_k", *packing.seqused_k, like_name, like);
    TORCH_CHECK_VALUE(packing.seqused_k->sym_size(0) == size - 1, "seqused_k must have one entry a sequence, ",
                      size - 1, ", got ", packing.seqused_k->sym_size(0));
  }
}

void check_queries_keys(const at::Tensor& q, const at::Tensor& k, const Packing& packing, const AttentionNames& names) {
  check_floating(names.q, q);
  check_like(names.k, k, names.q, q);
  check_packing(packing, names.q, q);
  check_dimensions(names.q, q, packing);
  check_dimensions(names.k, k, packing);
  TORCH_CHECK_VALUE(k.sym_size(-1) == q.sym_size(-1), names.k, " must have the head dimension of ", names.q, ", ",
                    q.sym_size(-1), ", got ", k.sym_size(-1));
  TORCH_CHECK_VALUE(heads_of(q) % heads_of(k) == 0, names.q, " must have a multiple of the heads of ", names.k, ", ",
                    heads_of(k), ", got ", heads_of(q));
  if (!packing.packed()) {
    TORCH_CHECK_VALUE(k.sym_size(0) == q.sym_size(0), names.k, " must have the batch size of ", names.q, ", ",
                      q.sym_size(0), ", got ", k.sym_size(0));
  }
}

void check_values(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionNames& names) {
  check_like(names.v, v, names.q, q);
  TORCH_CHECK_VALUE(v.dim() == k.dim(), names.v, " must have as many dimensions as ", names.k, ", ", k.dim(),
                    ", got shape ", v.sym_sizes());
  c10::SymDimVector shape(k.sym_sizes().begin(), k.sym_sizes().end());
  shape.back() = v.sym_size(-1);
  TORCH_CHECK_VALUE(v.sym_sizes() == c10::SymIntArrayRef(shape), names.v, " must have the shape of ", names.k,
                    " except for the head dimension, ", k.sym_sizes(), ", got ", v.sym_sizes());
  TORCH_CHECK_VALUE(v.sym_size(-1) >= 1, names.v, " must have at least one channel, got shape ", v.sym_sizes());
}

void check_query_length(const at::Tensor& q, const c10::SymInt& seqlen_k, const char* q_name, const char* k_name,
                        const Packing& packing) {
  if (!packing.packed()) {
    TORCH_CHECK_VALUE(tokens_of(q) <= seqlen_k, q_name, " must not be longer than the keys (", k_name, "), ", seqlen_k,
                      ", got ", tokens_of(q), " queries");
  }
}

void check_compressed_length(const at::Tensor& q, const at::Tensor& k_cmp, const std::optional<c10::SymInt>& seqlen_k,
                             int64_t block_size, int64_t block_stride, const Packing& packing) {
  if (packing.packed()) {
    return;
  }
  TORCH_CHECK_VALUE(seqlen_k.has_value(), "seqlen_k must be given: the number of uncompressed keys, got None");
  check_query_length(q, *seqlen_k, "q", "seqlen_k", packing);
  const c10::SymInt blocks =
      *seqlen_k < block_size ? c10::SymInt(0) : (*seqlen_k - block_size) / block_stride + c10::SymInt(1);
  TORCH_CHECK_VALUE(k_cmp.sym_size(1) == blocks, "k_cmp must hold the ", blocks, " blocks of seqlen_k = ", *seqlen_k,
                    " keys, got ", k_cmp.sym_size(1));
}

void check_block_indices(const at::Tensor& block_indices, const at::Tensor& q, const at::Tensor& k) {
  TORCH_CHECK_TYPE(block_indices.scalar_type() == at::kInt, "block_indices must be int32, got ",
                   block_indices.scalar_type());
  check_same_device("block_indices", block_indices, "q", q);
  TORCH_CHECK_VALUE(block_indices.dim() == q.dim(),
                    "block_indices must be (B, Tq, Hkv, n), packed (sum Tq, Hkv, n), got shape ",
                    block_indices.sym_sizes());
  c10::SymDimVector shape(q.sym_sizes().begin(), q.sym_sizes().end());
  shape[shape.size() - 2] = heads_of(k);
  shape.back() = block_indices.sym_size(-1);
  check_shape("block_indices", block_indices, shape, "(B, Tq, Hkv, n)");
}

c10::SymDimVector lse_shape(const at::Tensor& q) {
  if (q.dim() == 4) {
    return {q.sym_size(0), heads_of(q), tokens_of(q)};
  }
  return {heads_of(q), tokens_of(q)};
}

at::ScalarType lse_dtype(const at::Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_backward(const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& q,
                    const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse) {
  c10::SymDimVector shape(q.sym_sizes().begin(), q.sym_sizes().end());
  shape.back() = v.sym_size(-1);
  check_like("grad_out", grad_out, "q", q);
  check_shape("grad_out", grad_out, shape, "(B, Tq, Hq, Dv)");
  check_like("out", out, "q", q);
  check_shape("out", out, shape, "(B, Tq, Hq, Dv)");
  TORCH_CHECK_TYPE(lse.scalar_type() == lse_dtype(q), "lse must be ", lse_dtype(q), ", got ", lse.scalar_type());
  check_same_device("lse", lse, "q", q);
  check_shape("lse", lse, lse_shape(q), "(B, Hq, Tq)");
  if (grad_lse.has_value()) {
    check_like("grad_lse", *grad_lse, "lse", lse);
    check_shape("grad_lse", *grad_lse, lse_shape(q), "(B, Hq, Tq)");
  }
}

}  // namespace nsa
