// How the queries that chose a block are cut into pieces for Hopper's gradients of k and v:
// docs/hopper_key_gradients.md.
#pragma once

#include "selected/params.h"

namespace nsa {

// Pieces of a KV head with so many pairs of a query and a block, and so many blocks.
inline int64_t bound_key_pieces(const KeyPieces& pieces, int64_t pairs, int64_t blocks) {
  return blocks * pieces.chunks + pairs / min_of(pieces.most_queries, pieces.most_queries_at_last);
}

// All but the pointers. `row_bytes`: of q and grad_out, a query head. `heads`: KV heads of a launch.
inline KeyPieces plan_key_pieces(const SequenceLayout& s, int32_t num_selected, int64_t pairs, int64_t blocks,
                                 int64_t row_bytes, int64_t heads, int64_t multiprocessors) {
  constexpr int64_t kChunkBytes = int64_t{1} << 25;  // rows of a chunk, of which L2 keeps most
  constexpr int64_t kLeastRows = 3072;               // of a piece, on average: pieces cost time
  constexpr int64_t kMostRows = 6144;                // of any: pieces that begin together end at about the same time
  constexpr int64_t kMostRowsAtLast = 4096;          // of the last chunk's: little is left to do beside them
  constexpr int64_t kPiecesOfWarpgroup = 4;          // at least, as long as they have ...
  constexpr int64_t kRowsAnyway = 1024;              // ... so many rows
  const int64_t tokens = s.packed() ? s.length_q : s.batch * s.length_q;
  // A query chooses among half the blocks of its sequence, on average.
  const int64_t choices = max_of((s.packed() ? ceil_div(s.length_k, s.batch) : s.length_k) / 128, 1);
  const int64_t chunk =
      max_of(kChunkBytes / (s.group * row_bytes), kLeastRows * choices / (int64_t{num_selected} * s.group));
  const int64_t share = pairs * heads / s.heads_kv / (2 * multiprocessors * kPiecesOfWarpgroup);
  KeyPieces pieces{};
  pieces.chunk = static_cast<int32_t>(max_of(min_of(chunk, tokens), 1));
  pieces.chunks = static_cast<int32_t>(ceil_div(tokens, pieces.chunk));
  const auto queries_of = [&](int64_t rows) {
    return static_cast<int32_t>(max_of(min_of(share, ceil_div(rows, s.group)), ceil_div(kRowsAnyway, s.group)));
  };
  pieces.most_queries = queries_of(kMostRows);
  pieces.most_queries_at_last = queries_of(kMostRowsAtLast);
  pieces.most_pieces = bound_key_pieces(pieces, pairs / s.heads_kv, blocks / s.heads_kv);
  return pieces;
}

// What the pointers take, in int32: pieces, counts, progress.
inline int64_t key_pieces_ints(const KeyPieces& pieces, const SequenceLayout& s, int64_t blocks) {
  constexpr int64_t kOfPiece = sizeof(KeyPiece) / sizeof(int32_t);
  return s.heads_kv * pieces.most_pieces * kOfPiece + s.heads_kv + (blocks + s.heads_kv);
}
// `storage` begins at a multiple of 16 bytes.
inline void place_key_pieces(KeyPieces& pieces, const SequenceLayout& s, int32_t* storage) {
  pieces.pieces = reinterpret_cast<KeyPiece*>(storage);
  pieces.counts = reinterpret_cast<int32_t*>(pieces.pieces + s.heads_kv * pieces.most_pieces);
  pieces.progress = pieces.counts + s.heads_kv;
}

}  // namespace nsa
