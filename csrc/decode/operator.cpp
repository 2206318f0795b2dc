// nsa_attention_with_kvcache: checks, result, and the registrations of every backend.
#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "decode/call.h"
#include "decode/tiles.h"
#include "host/autograd.h"
#include "host/backend.h"
#include "host/checks.h"

namespace nsa {
namespace {

constexpr const char* kBranchNames[3][2] = {{"k_cmp", "v_cmp"}, {"k_slc", "v_slc"}, {"k_win", "v_win"}};
constexpr const char* kPages = "(pages, rows of a page, Hkv, D)";

void check_pool(int branch, const DecodeInputs& in) {
  const auto& [k_name, v_name] = kBranchNames[branch];
  const at::Tensor& k = in.keys[branch];
  const at::Tensor& v = in.values[branch];
  check_like(k_name, k, "q", in.q);
  check_like(v_name, v, "q", in.q);
  TORCH_CHECK_VALUE(k.dim() == 4, k_name, " must be ", kPages, ", got shape ", k.sym_sizes());
  TORCH_CHECK_VALUE(v.dim() == 4, v_name, " must be ", kPages, ", got shape ", v.sym_sizes());
  const c10::SymInt heads = in.keys[0].sym_size(2);
  check_shape(k_name, k, {k.sym_size(0), k.sym_size(1), heads, in.q.sym_size(-1)}, kPages);
  check_shape(v_name, v, {k.sym_size(0), k.sym_size(1), heads, in.values[0].sym_size(3)}, kPages);
  TORCH_CHECK_VALUE(k.sym_size(1) >= 1, k_name, " must have pages of at least one row, got shape ", k.sym_sizes());
}

void check_int_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& q) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt, name, " must be int32, got ", tensor.scalar_type());
  check_same_device(name, tensor, "q", q);
}

void check_table(const char* name, const at::Tensor& table, const DecodeInputs& in) {
  check_int_tensor(name, table, in.q);
  TORCH_CHECK_VALUE(table.dim() == 2 && table.sym_size(0) == in.cache_seqlens.sym_size(0), name,
                    " must be (B, pages of a sequence) with the B of cache_seqlens, ", in.cache_seqlens.sym_size(0),
                    ", got shape ", table.sym_sizes());
}

void check_queries(const DecodeInputs& in) {
  const at::Tensor& q = in.q;
  check_floating("q", q);
  const bool packed = in.cu_seqlens_q.has_value();
  TORCH_CHECK_VALUE(q.dim() == (packed ? 3 : 4), "q must be ",
                    packed ? "packed, (sum Tq, Hq, Dk), with cu_seqlens_q" : "(B, Tq, Hq, Dk)", ", got shape ",
                    q.sym_sizes());
  TORCH_CHECK_VALUE(in.keys[0].dim() == 4, "k_cmp must be ", kPages, ", got shape ", in.keys[0].sym_sizes());
  const c10::SymInt heads = q.sym_size(-2);
  const c10::SymInt heads_kv = in.keys[0].sym_size(2);
  TORCH_CHECK_VALUE(heads_kv >= 1 && heads >= 1 && heads % heads_kv == 0,
                    "q must have a multiple of the heads of k_cmp, got ", heads, " and ", heads_kv);
  check_int_tensor("cache_seqlens", in.cache_seqlens, q);
  TORCH_CHECK_VALUE(in.cache_seqlens.dim() == 1, "cache_seqlens must be (B,), got shape ",
                    in.cache_seqlens.sym_sizes());
  if (packed) {
    check_cumulative_vector("cu_seqlens_q", *in.cu_seqlens_q, "q", q);
    check_shape("cu_seqlens_q", *in.cu_seqlens_q, {in.cache_seqlens.sym_size(0) + 1}, "(B + 1,)");
  } else {
    check_shape("cache_seqlens", in.cache_seqlens, {q.sym_size(0)}, "(B,)");
  }
  check_floating("gates", in.gates);
  check_same_device("gates", in.gates, "q", q);
  c10::SymDimVector shape(q.sym_sizes().begin(), q.sym_sizes().end());
  shape.back() = 3;
  check_shape("gates", in.gates, shape, "(B, Tq, Hq, 3)");
}

void check_pages(const DecodeInputs& in, const DecodeOptions& options, bool own_window) {
  for (int branch = 0; branch < 3; ++branch) {
    check_pool(branch, in);
  }
  const c10::SymInt page = in.keys[1].sym_size(1);
  TORCH_CHECK_VALUE(page % options.select_size == 0, "k_slc must have pages of a multiple of select_size, ",
                    options.select_size, ", tokens, got ", page);
  TORCH_CHECK_VALUE(in.keys[0].sym_size(1) * options.blocks.block_stride == page,
                    "k_cmp must have one row a page for every block_stride, ", options.blocks.block_stride, ", of the ",
                    page, " tokens of k_slc's, got ", in.keys[0].sym_size(1));
  TORCH_CHECK_VALUE(own_window || in.keys[2].sym_size(1) == page, "k_win must have the pages of k_slc, of ", page,
                    " tokens, or a window_table, got pages of ", in.keys[2].sym_size(1));
  check_table("block_table", in.tables[1], in);
  check_table("window_table", in.tables[2], in);
  TORCH_CHECK_VALUE(in.tables[1].sym_size(1) * page <= kLargestSize,
                    "block_table must name fewer than 2^31 tokens, got ", in.tables[1].sym_size(1), " pages of ", page);
}

int64_t count_queries(const DecodeInputs& in, const std::optional<int64_t>& max_seqlen_q) {
  if (!in.cu_seqlens_q.has_value()) {
    TORCH_CHECK_VALUE(!max_seqlen_q.has_value(), "max_seqlen_q must come with cu_seqlens_q, got it alone");
    return in.q.dim() == 4 ? in.q.sym_size(1).guard_int(__FILE__, __LINE__) : 0;
  }
  TORCH_CHECK_VALUE(max_seqlen_q.has_value(), "max_seqlen_q must come with cu_seqlens_q");
  check_size("max_seqlen_q", *max_seqlen_q, 0);
  return *max_seqlen_q;
}

template <Backend backend>
at::Tensor attend(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& v_cmp, const at::Tensor& k_slc,
                  const at::Tensor& v_slc, const at::Tensor& k_win, const at::Tensor& v_win, const at::Tensor& gates,
                  const at::Tensor& cache_seqlens, const at::Tensor& block_table, const OptionalTensor& window_table,
                  const OptionalTensor& cu_seqlens_q, std::optional<int64_t> max_seqlen_q, int64_t block_size,
                  int64_t block_stride, int64_t select_size, int64_t num_selected, int64_t num_initial,
                  int64_t num_local, int64_t window, OptionalDouble scale, std::optional<int64_t> num_splits) {
  DecodeInputs in{q,     {k_cmp, k_slc, k_win}, {v_cmp, v_slc, v_win}, {block_table, block_table, block_table},
                  gates, cache_seqlens,         cu_seqlens_q};
  if (window_table.has_value()) {
    in.tables[2] = *window_table;
  }
  check_scale(scale);
  check_block_sizes(block_size, block_stride, select_size);
  check_block_budget(num_selected, num_initial, num_local);
  check_window_length(window);
  check_size("num_splits", num_splits.value_or(1), 1);
  check_queries(in);
  const DecodeOptions options{{block_size, block_stride},
                              select_size,
                              num_selected,
                              {num_initial, num_local},
                              std::min(window, kLargestSize),
                              softmax_scale(scale, q.sym_size(-1).guard_int(__FILE__, __LINE__)),
                              num_splits.value_or(0)};
  check_pages(in, options, window_table.has_value());
  in.max_seqlen_q = count_queries(in, max_seqlen_q);
  TORCH_CHECK_VALUE(in.max_seqlen_q <= kMostDecodeQueries, "q must have at most ", kMostDecodeQueries,
                    " queries of a sequence, got ", in.max_seqlen_q, " (nsa_attention takes any)");
  c10::SymDimVector shape(q.sym_sizes().begin(), q.sym_sizes().end());
  shape.back() = v_slc.sym_size(3);
  // Packed queries of no sequence get zeros.
  const at::Tensor out =
      cu_seqlens_q.has_value() ? at::zeros_symint(shape, q.options()) : at::empty_symint(shape, q.options());
  if constexpr (backend == Backend::kCpu) {
    cpu::decode(in, options, out);
  }
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    cuda::decode(in, options, out);
  }
#endif
  return out;
}

template <typename... Args>
at::Tensor refuse_gradients(Args... args) {
  const auto wants = [](const auto& x) {
    if constexpr (std::is_same_v<std::decay_t<decltype(x)>, at::Tensor>) {
      return x.requires_grad();
    } else {
      return false;
    }
  };
  TORCH_CHECK_VALUE(!at::GradMode::is_enabled() || !(wants(args) || ...),
                    "nsa_attention_with_kvcache has no gradient: call it under torch.no_grad(), or nsa_attention");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = find_op<at::Tensor(Args...)>("nsa::nsa_attention_with_kvcache");
  return op.call(args...);
}

template <typename... Args>
constexpr auto refuse_gradients_of(at::Tensor (*)(Args...)) {
  return refuse_gradients<Args...>;
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) { m.impl("nsa_attention_with_kvcache", attend<Backend::kCpu>); }
TORCH_LIBRARY_IMPL(nsa, Meta, m) { m.impl("nsa_attention_with_kvcache", attend<Backend::kMeta>); }
#if defined(NSA_CUDA_VERSION)
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { m.impl("nsa_attention_with_kvcache", attend<Backend::kCuda>); }
#endif
TORCH_LIBRARY_IMPL(nsa, Autograd, m) {
  m.impl("nsa_attention_with_kvcache", refuse_gradients_of(&attend<Backend::kMeta>));
}

}  // namespace nsa
