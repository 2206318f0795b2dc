// Native Sparse Attention (arXiv 2502.11089) for LibTorch programs: the functions of the Python package nsa_torch, in
// C++.
//
// Link nsa_torch's library for your LibTorch: CMake's find_package(nsa_torch) takes it, target nsa_torch::nsa_torch.
// Its ops register with PyTorch's dispatcher when it is loaded, and the functions below call them there: autograd,
// autocast, CPU and CUDA work as they do from Python, bad input throws c10::ValueError or c10::TypeError, and a library
// of another version is refused by the schema.
//
// Tensors are dense (B, T, H, D), or packed (sum T, H, D) when Sequences holds cu_seqlens. Query i of a sequence stands
// at position Tk - Tq + i. lse is float32 (float64 for float64), (B, Hq, Tq) or packed (Hq, sum Tq), natural logarithm.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace nsa {

// The sizes of the method, in tokens or blocks; every function reads the ones it needs. The defaults are the paper's.
struct Options {
  int64_t block_size = 32;      // l: keys in a compression block
  int64_t block_stride = 16;    // d: keys from one compression block to the next; divides block_size and select_size
  int64_t select_size = 64;     // l': keys in a selection block
  int64_t num_selected = 16;    // n: selection blocks per query and KV head, forced ones included
  int64_t num_initial = 1;      // forced blocks at the start of the sequence
  int64_t num_local = 2;        // forced blocks up to the query's own
  int64_t window = 512;         // w: keys of the window branch, the query's own included
  std::optional<double> scale;  // softmax scale; Dk^-1/2 when empty
};

// Where packed sequences begin and end; left empty, tensors are dense. cu_seqlens_k counts uncompressed keys
// everywhere.
struct Sequences {
  std::optional<at::Tensor> cu_seqlens_q;  // int32 (B + 1)
  std::optional<at::Tensor> cu_seqlens_k;  // int32 (B + 1)
  std::optional<int64_t> max_seqlen_q;     // an upper bound; the total when empty
  std::optional<int64_t> max_seqlen_k;
  std::optional<at::Tensor> seqused_k;  // int32 (B): keys in use of each slot of a cache
};

// The map phi of a compression block to one token. Every weight may have a leading dimension of Hkv: one map per KV
// head.
//   w1 and w2 given:  linear, exact GELU, linear.   w1 alone: linear.   nothing: the mean of the block.
struct CompressionWeights {
  std::optional<at::Tensor> pe;  // (l, D): added to the block before the first linear map; needs w1
  std::optional<at::Tensor> w1;  // (hidden, l * D); without w2 (D', l * D)
  std::optional<at::Tensor> b1;  // (hidden); without w2 (D')
  std::optional<at::Tensor> w2;  // (D', hidden)
  std::optional<at::Tensor> b2;  // (D')
};

// How many compression blocks a sequence of seqlen keys has.
inline int64_t num_blocks(int64_t seqlen, const Options& options = {}) {
  return seqlen < options.block_size ? 0 : (seqlen - options.block_size) / options.block_stride + 1;
}

namespace detail {

using OptionalTensor = const std::optional<at::Tensor>&;
using OptionalInt = std::optional<c10::SymInt>;

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline OptionalInt to_symint(const std::optional<int64_t>& value) {
  return value ? OptionalInt(*value) : OptionalInt();
}

}  // namespace detail

// Eq. 7: x (B, T, Hkv, D) -> (B, num_blocks(T), Hkv, D'). Packed: (sum T / d, Hkv, D'), each sequence's blocks after
// those of the sequences before it, the rows that remain zero.
inline at::Tensor compress(const at::Tensor& x, const CompressionWeights& weights = {}, const Options& options = {},
                           const Sequences& sequences = {}) {
  using detail::OptionalInt;
  using detail::OptionalTensor;
  static const auto op =
      detail::find_op<at::Tensor(const at::Tensor&, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                                 OptionalTensor, int64_t, int64_t, OptionalTensor, OptionalInt)>("nsa::compress");
  return op.call(x, weights.pe, weights.w1, weights.b1, weights.w2, weights.b2, options.block_size,
                 options.block_stride, sequences.cu_seqlens_k, detail::to_symint(sequences.max_seqlen_k));
}

// Rotary positions of x (B, T, H, D) or packed (sum T, H, D), in Llama's half-split convention: the halves (a, b) of a
// head become (cos_a a - sin_a b, cos_b b + sin_b a), transposed (cos_a a + sin_b b, cos_b b - sin_a a). cos and sin
// are (B, T, 1, D) or what broadcasts to it, and have no gradient.
inline at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed = false) {
  static const auto op =
      detail::find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool)>("nsa::rotate");
  return op.call(x, cos, sin, transposed);
}

// Attention of q (B, Tq, Hq, Dk) over compressed tokens k_cmp (B, M, Hkv, Dk), v_cmp (B, M, Hkv, Dv) -> out, lse.
// seqlen_k is Tk, the number of uncompressed keys: needed for dense tensors, unused for packed ones.
inline std::tuple<at::Tensor, at::Tensor> compressed_attention(const at::Tensor& q, const at::Tensor& k_cmp,
                                                               const at::Tensor& v_cmp, std::optional<int64_t> seqlen_k,
                                                               const Options& options = {},
                                                               const Sequences& sequences = {}) {
  using detail::OptionalInt;
  using detail::OptionalTensor;
  static const auto op = detail::find_op<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, OptionalInt, int64_t, int64_t, std::optional<double>,
      OptionalTensor, OptionalTensor, OptionalInt, OptionalInt, OptionalTensor)>("nsa::compressed_attention");
  return op.call(q, k_cmp, v_cmp, detail::to_symint(seqlen_k), options.block_size, options.block_stride, options.scale,
                 sequences.cu_seqlens_q, sequences.cu_seqlens_k, detail::to_symint(sequences.max_seqlen_q),
                 detail::to_symint(sequences.max_seqlen_k), sequences.seqused_k);
}

// Eq. 8-12: the blocks that every query and KV head reads, from the scores of the compressed branch (lse is its second
// result) -> int32 (B, Tq, Hkv, num_selected), ascending, -1 last. No gradient flows through the choice.
inline at::Tensor select_blocks(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& lse,
                                std::optional<int64_t> seqlen_k, const Options& options = {},
                                const Sequences& sequences = {}) {
  using detail::OptionalInt;
  using detail::OptionalTensor;
  static const auto op =
      detail::find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, OptionalInt, int64_t, int64_t,
                                 int64_t, int64_t, int64_t, int64_t, std::optional<double>, OptionalTensor,
                                 OptionalTensor, OptionalInt, OptionalInt, OptionalTensor)>("nsa::select_blocks");
  return op.call(q, k_cmp, lse, detail::to_symint(seqlen_k), options.block_size, options.block_stride,
                 options.select_size, options.num_selected, options.num_initial, options.num_local, options.scale,
                 sequences.cu_seqlens_q, sequences.cu_seqlens_k, detail::to_symint(sequences.max_seqlen_q),
                 detail::to_symint(sequences.max_seqlen_k), sequences.seqused_k);
}

// Attention over the keys of the listed blocks, block_indices int32 (B, Tq, Hkv, n), -1 entries ignored -> out, lse.
inline std::tuple<at::Tensor, at::Tensor> selected_attention(const at::Tensor& q, const at::Tensor& k,
                                                             const at::Tensor& v, const at::Tensor& block_indices,
                                                             const Options& options = {},
                                                             const Sequences& sequences = {}) {
  using detail::OptionalInt;
  using detail::OptionalTensor;
  static const auto op = detail::find_op<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, std::optional<double>,
      OptionalTensor, OptionalTensor, OptionalInt, OptionalInt, OptionalTensor)>("nsa::selected_attention");
  return op.call(q, k, v, block_indices, options.select_size, options.scale, sequences.cu_seqlens_q,
                 sequences.cu_seqlens_k, detail::to_symint(sequences.max_seqlen_q),
                 detail::to_symint(sequences.max_seqlen_k), sequences.seqused_k);
}

// Attention over the last `window` keys, the query's own included -> out, lse.
inline std::tuple<at::Tensor, at::Tensor> window_attention(const at::Tensor& q, const at::Tensor& k,
                                                           const at::Tensor& v, const Options& options = {},
                                                           const Sequences& sequences = {}) {
  using detail::OptionalInt;
  using detail::OptionalTensor;
  static const auto op = detail::find_op<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::SymInt, std::optional<double>, OptionalTensor,
      OptionalTensor, OptionalInt, OptionalInt, OptionalTensor)>("nsa::window_attention");
  return op.call(q, k, v, options.window, options.scale, sequences.cu_seqlens_q, sequences.cu_seqlens_k,
                 detail::to_symint(sequences.max_seqlen_q), detail::to_symint(sequences.max_seqlen_k),
                 sequences.seqused_k);
}

// Eq. 5: the three branches, each over keys and values of its own, weighted by gates (B, Tq, Hq, 3) in the order
// compressed, selected, window -> out (B, Tq, Hq, Dv). block_indices, when given, are read instead of choosing.
inline at::Tensor nsa_attention(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& v_cmp,
                                const at::Tensor& k_slc, const at::Tensor& v_slc, const at::Tensor& k_win,
                                const at::Tensor& v_win, const at::Tensor& gates, const Options& options = {},
                                const std::optional<at::Tensor>& block_indices = std::nullopt,
                                const Sequences& sequences = {}) {
  using detail::OptionalInt;
  using detail::OptionalTensor;
  static const auto op = detail::find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, c10::SymInt,
      std::optional<double>, OptionalTensor, OptionalTensor, OptionalTensor, OptionalInt, OptionalInt, OptionalTensor)>(
      "nsa::nsa_attention");
  return op.call(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, options.block_size, options.block_stride,
                 options.select_size, options.num_selected, options.num_initial, options.num_local, options.window,
                 options.scale, block_indices, sequences.cu_seqlens_q, sequences.cu_seqlens_k,
                 detail::to_symint(sequences.max_seqlen_q), detail::to_symint(sequences.max_seqlen_k),
                 sequences.seqused_k);
}

// Keys and values of a branch in pages: (pages, rows of a page, Hkv, D). See nsa_attention_with_kvcache.
struct PagedCache {
  at::Tensor k_cmp, v_cmp;                 // page_size / block_stride rows a page
  at::Tensor k_slc, v_slc;                 // page_size rows, a multiple of select_size
  at::Tensor k_win, v_win;                 // as k_slc, or of any size with a window_table
  at::Tensor cache_seqlens;                // int32 (B): tokens of each sequence, the queries' own included
  at::Tensor block_table;                  // int32 (B, pages of a sequence)
  std::optional<at::Tensor> window_table;  // the same for k_win and v_win
};

// nsa_attention of the last tokens of sequences in pages, without gradients: q (B, Tq, Hq, Dk), Tq at most 8, or packed
// with cu_seqlens_q and max_seqlen_q -> out (B, Tq, Hq, Dv). num_splits, when given, makes a sequence's result
// independent of its batch, to the bit.
inline at::Tensor nsa_attention_with_kvcache(const at::Tensor& q, const PagedCache& cache, const at::Tensor& gates,
                                             const Options& options = {}, const Sequences& sequences = {},
                                             std::optional<int64_t> num_splits = std::nullopt) {
  using detail::OptionalTensor;
  static const auto op = detail::find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, OptionalTensor, OptionalTensor,
      std::optional<int64_t>, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, std::optional<double>,
      std::optional<int64_t>)>("nsa::nsa_attention_with_kvcache");
  return op.call(q, cache.k_cmp, cache.v_cmp, cache.k_slc, cache.v_slc, cache.k_win, cache.v_win, gates,
                 cache.cache_seqlens, cache.block_table, cache.window_table, sequences.cu_seqlens_q,
                 sequences.max_seqlen_q, options.block_size, options.block_stride, options.select_size,
                 options.num_selected, options.num_initial, options.num_local, options.window, options.scale,
                 num_splits);
}

}  // namespace nsa
