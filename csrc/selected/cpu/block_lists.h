// A tile's choices turned round: for each block, the tokens of the tile that chose it. A block's keys then meet all
// their queries in one matrix product, instead of G rows at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/cpu_tiles.h"
#include "common/geometry.h"
#include "host/cpu/tile.h"

namespace nsa::cpu {

constexpr int64_t kRowsPerProduct = 512;

// Block lists, (B, Tq, Hkv, n) or (sum Tq, Hkv, n), contiguous.
struct BlockLists {
  Rows<const int32_t> rows;
  int64_t per_token;
  int64_t select_size;
};

// Some tokens of a tile that read one block, and the keys of it that exist.
struct BlockGroup {
  KeyRange keys;
  const int32_t* tokens;
  int64_t num_tokens;
};

// Calls visit(BlockGroup) for the blocks of a tile in ascending order, at most kRowsPerProduct rows at a time (one
// token's rows at least). A token is listed only where it sees at least one key.
template <typename Visit>
void for_each_block(const TileSpan& span, const BlockLists& lists, const Visit& visit) {
  const SequencePlace& sequence = *span.sequence;
  const int64_t kv_head = span.head / span.group;
  const int64_t num_blocks = ceil_div(span.position(span.tokens - 1) + 1, lists.select_size);
  const auto list_of = [&](int64_t token) {
    return lists.rows.at(sequence.batch, sequence.q_begin + span.first + token, kv_head);
  };
  const auto is_read = [&](int64_t token, int32_t block) {
    return block >= 0 && block * lists.select_size <= span.position(token);
  };

  // Counting sort of (block, token) by block.
  std::vector<int64_t> ends(static_cast<size_t>(num_blocks) + 1, 0);
  for (int64_t t = 0; t < span.tokens; ++t) {
    const int32_t* list = list_of(t);
    for (int64_t i = 0; i < lists.per_token; ++i) {
      if (is_read(t, list[i])) {
        ++ends[list[i] + 1];
      }
    }
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    ends[b + 1] += ends[b];
  }
  std::vector<int32_t> tokens(static_cast<size_t>(ends[num_blocks]));
  for (int64_t t = 0; t < span.tokens; ++t) {
    const int32_t* list = list_of(t);
    for (int64_t i = 0; i < lists.per_token; ++i) {
      if (is_read(t, list[i])) {
        tokens[ends[list[i]]++] = static_cast<int32_t>(t);
      }
    }
  }

  const int64_t most = std::max<int64_t>(kRowsPerProduct / span.group, 1);
  int64_t begin = 0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const KeyRange keys{b * lists.select_size, std::min<int64_t>((b + 1) * lists.select_size, sequence.k_length)};
    for (; begin < ends[b]; begin += std::min(most, ends[b] - begin)) {
      visit(BlockGroup{keys, tokens.data() + begin, std::min(most, ends[b] - begin)});
    }
  }
}

// Copies the rows of a group's tokens out of a tile's rows.
template <typename T>
void gather(const BlockGroup& group, int64_t heads, int64_t width, const T* from, T* to) {
  for (int64_t i = 0; i < group.num_tokens; ++i) {
    std::copy_n(from + group.tokens[i] * heads * width, heads * width, to + i * heads * width);
  }
}

}  // namespace nsa::cpu
