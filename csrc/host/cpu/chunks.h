// How a tile of queries walks its keys: chunk by chunk, each with the queries that see any of it. A query's range moves
// only forwards from one query to the next, so those queries are consecutive.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu_tiles.h"
#include "common/geometry.h"
#include "host/cpu/tile.h"

namespace nsa::cpu {

struct Chunk {
  KeyRange keys;
  int64_t token_begin;  // of the tile
  int64_t token_end;
};

// The part of a chunk that a token of the tile sees, counted from the chunk's first key.
template <typename Keys>
KeyRange visible_in_chunk(const TileSpan& span, const Keys& keys, const Chunk& chunk, int64_t token) {
  const KeyRange range = keys.visible(span.position(token));
  return {std::max(range.begin, chunk.keys.begin) - chunk.keys.begin,
          std::min(range.end, chunk.keys.end) - chunk.keys.begin};
}

// Calls visit(chunk) for every chunk with its non-empty set of queries; each of them sees at least one of its keys.
template <typename Keys, typename Visit>
void for_each_chunk(const TileSpan& span, const Keys& keys, const Visit& visit) {
  const int64_t begin = keys.visible(span.position(0)).begin;
  const int64_t end = keys.visible(span.position(span.tokens - 1)).end;
  for (int64_t first = begin; first < end; first += kKeysPerChunk) {
    Chunk chunk{{first, std::min(first + kKeysPerChunk, end)}, 0, span.tokens};
    while (keys.visible(span.position(chunk.token_begin)).end <= chunk.keys.begin) {
      ++chunk.token_begin;
    }
    while (keys.visible(span.position(chunk.token_end - 1)).begin >= chunk.keys.end) {
      --chunk.token_end;
    }
    visit(chunk);
  }
}

}  // namespace nsa::cpu
