// What the kernels of attention over listed blocks are told.
#pragma once

#include "common/params.h"

namespace nsa {

struct SelectedForwardParams {
  SequenceLayout sequences;
  float scale;
  int32_t select_size;           // l'
  int32_t num_selected;          // n
  const int32_t* block_indices;  // (B, Tq, Hkv, n) or (sum Tq, Hkv, n), contiguous: ascending, -1 last
  TensorView q;                  // (B, Tq, Hq, Dk)
  TensorView k;                  // (B, Tk, Hkv, Dk)
  TensorView v;                  // (B, Tk, Hkv, Dv)
  TensorView out;                // (B, Tq, Hq, Dv)
  RowView lse;                   // (B, Hq, Tq)
};

// What one warpgroup of Hopper's gradients of k and v sums up: a block, and queries that chose it, all of one chunk.
struct KeyPiece {
  int32_t id;        // of the block, counted as ChosenBy's
  int32_t sequence;  // the block's
  int32_t block;     // within the sequence
  int32_t head_kv;
  int32_t first;    // of its queries, in ChosenBy.queries
  int32_t queries;  // 0 where nobody chose the block
  int32_t number;   // of the block's pieces, in the order in which they are added
  int32_t last;     // whether it is the last of them
};

// The blocks' queries cut into pieces: at common boundaries, every `chunk` queries of the batch, and again where more
// than `most_queries` of a chunk chose a block. Pieces are worked on chunk by chunk and in a chunk the longest first.
struct KeyPieces {
  int32_t chunk;
  int32_t chunks;
  int32_t most_queries;          // of a piece
  int32_t most_queries_at_last;  // of a piece of the last chunk: pieces that nothing comes after
  int64_t most_pieces;           // of a KV head
  KeyPiece* pieces;              // (Hkv, most_pieces), in the order of work
  int32_t* counts;               // (Hkv,) pieces of each head
  int32_t* progress;  // (Hkv, 1 + blocks of a head) pieces taken, of the launch that begins with the head, and
                      // warps that are done with pieces of each block; set to 0 before a launch
};

// The lists turned round: which queries chose each block. A block's queries are cut into segments, for balance; for
// Hopper into pieces.
struct ChosenBy {
  int64_t blocks;          // slots of blocks, times Hkv
  int32_t segment;         // queries per segment, at most
  Divisor ranks;           // n where queries have ranks, else 1
  const int32_t* queries;  // (pairs,) queries (counted through the whole batch), sorted by block, ascending; with ranks
                           // query * n + rank, the block's place among those of its list that the query may read,
                           // in ascending order
  const int32_t* begins;   // (blocks + 1,) where each block's queries begin
  const int32_t* segments;  // (blocks + 1,) segments before each block: at least one each
  const int32_t* partials;  // (blocks + 1,) segments before each block among blocks of more than one
  int64_t full_segments;    // pairs / segment: what the host knows of segments[blocks] ...
  int64_t max_segments;     // ... and its bound, with one more for each block
  KeyPieces pieces;
};

// How the lists are turned round: pairs (block, query) are sorted by block, which keeps queries in order.
struct InvertListsParams {
  SequenceLayout sequences;
  int32_t select_size;
  int32_t num_selected;
  const int32_t* block_indices;
  int64_t pairs;   // entries of all lists
  int64_t blocks;  // as in ChosenBy
  int32_t segment;
  bool ranked;           // as ChosenBy.ranks says
  int32_t* keys;         // (pairs,) workspace
  int32_t* sorted_keys;  // (pairs,) workspace
  int32_t* values;       // (pairs,) workspace
  int32_t* queries;      // (pairs,) and the next three: what ChosenBy points at
  int32_t* begins;
  int32_t* segments;  // null: begins, segments and partials are not wanted
  int32_t* partials;
  KeyPieces pieces;        // pieces.pieces null: not wanted
  int32_t* edges;          // (chunks + 1, blocks) workspace for them
  int32_t* pieces_before;  // (chunks, blocks) workspace for them
  void* temporary;         // workspace of temporary_bytes
  int64_t temporary_bytes;
};

// The gradients of scores, which on Hopper the kernel of the gradients of k and v hands to that of the gradient of q:
// of a few KV heads at a time. (KV heads, queries, n, heads of the group / 8, 64 keys / 16, head mod 8, 4, 4): the last
// two are lanes, and the keys that each holds of a product's left operand: 2 i, 2 i + 1, 2 i + 8, 2 i + 9.
struct HandedScores {
  void* data;  // nullptr: the kernel of the gradient of q computes them itself
  int32_t first_head;
  int32_t heads;
  int64_t queries;  // of the batch

  // In units of 32 bytes, 16 keys of a head. Of a query and block, whose heads fill left operands of 16 rows, or of
  // eight where there are no more. Four heads or fewer leave the other half of the eight out.
  NSA_HOST_DEVICE static int32_t units(int32_t group) {
    return group > 8 ? (group + 15) / 16 * 64 : 4 * key_units(group);
  }
  NSA_HOST_DEVICE static int32_t head_units(int32_t head) { return head / 8 * 32 + head % 8; }
  // From 16 keys to the next.
  NSA_HOST_DEVICE static int32_t key_units(int32_t group) { return group > 4 ? 8 : 4; }
};

struct SelectedBackwardParams {
  SequenceLayout sequences;
  float scale;
  int32_t select_size;
  int32_t num_selected;
  const int32_t* block_indices;
  ChosenBy chosen_by;
  TensorView q, k, v, grad_out;
  RowView lse, delta, gate, grad_lse;  // as in range/params.h
  TensorView grad_q, grad_k, grad_v;
  bool add_to_grad_q;
  float* partials;  // (partials[blocks], keys per block, Dk + Dv); of pieces: a sum for each block of a launch
  HandedScores handed;
};

}  // namespace nsa
