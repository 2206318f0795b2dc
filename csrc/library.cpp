// The schema of every op: the table of contents of the library, and long because it is one list.
//
// Layouts: dense (B, T, H, D), or packed (sum T, H, D) with cu_seqlens_q and cu_seqlens_k (int32, B + 1). seqused_k
// (int32, B) says how many keys of each packed slot are in use. Options that are the same everywhere come last.
// A backward computes the gradients that its output_mask names; the others are tensors of no elements.
#include <torch/library.h>

TORCH_LIBRARY(nsa, m) {
  m.def(
      "compress(Tensor x, Tensor? pe=None, Tensor? w1=None, Tensor? b1=None, Tensor? w2=None, Tensor? b2=None, *, "
      "int block_size=32, int block_stride=16, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_k=None) -> Tensor");
  m.def(
      "compress_backward(Tensor grad_out, Tensor x, Tensor? pe, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, *, "
      "bool[6] output_mask=[True, True, True, True, True, True], int block_size, int block_stride, "
      "Tensor? cu_seqlens_k, SymInt? max_seqlen_k) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Rotary position embedding; transposed: its gradient.
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool transposed=False) -> Tensor");

  m.def(
      "compressed_attention(Tensor q, Tensor k_cmp, Tensor v_cmp, *, SymInt? seqlen_k=None, int block_size=32, "
      "int block_stride=16, float? scale=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? seqused_k=None) -> (Tensor, Tensor)");
  m.def(
      "compressed_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor "
      "out, "
      "Tensor lse, *, bool[3] output_mask=[True, True, True], "
      "SymInt? seqlen_k, int block_size, int block_stride, float? scale, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? seqused_k) -> (Tensor, Tensor, "
      "Tensor)");

  m.def(
      "select_blocks(Tensor q, Tensor k_cmp, Tensor lse, *, SymInt? seqlen_k=None, int block_size=32, int "
      "block_stride=16, "
      "int select_size=64, int num_selected=16, int num_initial=1, int num_local=2, float? scale=None, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
      "Tensor? seqused_k=None) -> Tensor");

  m.def(
      "selected_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices, *, int select_size=64, float? "
      "scale=None, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
      "Tensor? seqused_k=None) -> (Tensor, Tensor)");
  m.def(
      "selected_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor "
      "block_indices, "
      "Tensor out, Tensor lse, *, bool[3] output_mask=[True, True, True], int select_size, float? scale, Tensor? "
      "cu_seqlens_q, Tensor? cu_seqlens_k, "
      "SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? seqused_k) -> (Tensor, Tensor, Tensor)");

  m.def(
      "window_attention(Tensor q, Tensor k, Tensor v, *, SymInt window=512, float? scale=None, Tensor? "
      "cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? seqused_k=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, *, bool[3] output_mask=[True, True, True], "
      "SymInt window, float? scale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
      "SymInt? max_seqlen_k, Tensor? seqused_k) -> (Tensor, Tensor, Tensor)");

  m.def(
      "nsa_attention(Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_win, Tensor v_win, "
      "Tensor gates, *, int block_size=32, int block_stride=16, int select_size=64, int num_selected=16, int "
      "num_initial=1, "
      "int num_local=2, SymInt window=512, float? scale=None, Tensor? block_indices=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? seqused_k=None) -> "
      "Tensor");
  // out, then what the backward needs: out_cmp, lse_cmp, out_slc, lse_slc, out_win, lse_win, block_indices.
  m.def(
      "nsa_attention_forward(Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_win, Tensor "
      "v_win, "
      "Tensor gates, *, int block_size, int block_stride, int select_size, int num_selected, int num_initial, "
      "int num_local, SymInt window, float? scale, Tensor? block_indices, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? seqused_k) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "nsa_attention_backward(Tensor grad_out, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, "
      "Tensor k_win, Tensor v_win, Tensor gates, Tensor out_cmp, Tensor lse_cmp, Tensor out_slc, Tensor lse_slc, "
      "Tensor out_win, Tensor lse_win, Tensor block_indices, *, "
      "bool[8] output_mask=[True, True, True, True, True, True, True, True], int block_size, int block_stride, int "
      "select_size, "
      "SymInt window, float? scale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
      "SymInt? max_seqlen_k, Tensor? seqused_k) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Few new queries of sequences whose keys lie in pages; cache_seqlens counts them as well.
  m.def(
      "nsa_attention_with_kvcache(Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_win, "
      "Tensor v_win, Tensor gates, *, Tensor cache_seqlens, Tensor block_table, Tensor? window_table=None, "
      "Tensor? cu_seqlens_q=None, int? max_seqlen_q=None, int block_size=32, int block_stride=16, int select_size=64, "
      "int num_selected=16, int num_initial=1, int num_local=2, int window=512, float? scale=None, "
      "int? num_splits=None) -> Tensor");
}
