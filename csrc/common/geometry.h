// Where blocks lie and what a query sees: the integer arithmetic that every kernel shares, on the host and on the
// device. Symbols as in docs/math.md: l = block_size, d = block_stride, l' = select_size, p = the position of a query.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NSA_HOST_DEVICE __host__ __device__
#else
#define NSA_HOST_DEVICE
#endif

namespace nsa {

NSA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

NSA_HOST_DEVICE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
NSA_HOST_DEVICE constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys [begin, end) of one branch.
struct KeyRange {
  int64_t begin;
  int64_t end;
};

// The position of a sequence's first query, unless a caller has another: the last query sees the last key.
NSA_HOST_DEVICE constexpr int32_t default_offset(int64_t queries, int64_t keys) {
  return static_cast<int32_t>(keys - queries);
}

// Block m covers keys [m d, m d + l): how many fit into `length` keys.
NSA_HOST_DEVICE constexpr int64_t num_compressed_blocks(int64_t length, int64_t block_size, int64_t block_stride) {
  return length < block_size ? 0 : (length - block_size) / block_stride + 1;
}

// A compressed block is visible to p when its last key, m d + l - 1, is at p or before it.
struct CompressedRange {
  int64_t block_size;
  int64_t block_stride;

  NSA_HOST_DEVICE constexpr KeyRange operator()(int64_t position) const {
    return {0, num_compressed_blocks(position + 1, block_size, block_stride)};
  }
};

// The window holds `window` keys, the query's own included.
struct WindowRange {
  int64_t window;

  NSA_HOST_DEVICE constexpr KeyRange operator()(int64_t position) const {
    return {max_of(position + 1 - window, 0), position + 1};
  }
};

// Eq. 9 of the paper: importance of selection block j is the sum over compressed blocks m of p_cmp[m] * count(m, j),
// where count is the number of stride-d pieces that both cover. Compressed block m covers pieces [m, m + l/d),
// selection block j covers pieces [j l'/d, (j + 1) l'/d).
struct BlockOverlap {
  int64_t pieces_per_compressed;  // l / d
  int64_t pieces_per_selected;    // l' / d

  NSA_HOST_DEVICE constexpr int64_t first(int64_t selected) const {
    return max_of(selected * pieces_per_selected - pieces_per_compressed + 1, 0);
  }
  NSA_HOST_DEVICE constexpr int64_t end(int64_t selected) const { return (selected + 1) * pieces_per_selected; }
  NSA_HOST_DEVICE constexpr int64_t count(int64_t compressed, int64_t selected) const {
    return min_of(compressed + pieces_per_compressed, (selected + 1) * pieces_per_selected) -
           max_of(compressed, selected * pieces_per_selected);
  }
};

// Blocks that every query reads whatever their importance: the first `initial`, and the query's own with the local - 1
// before it.
struct ForcedBlocks {
  int64_t initial;
  int64_t local;

  NSA_HOST_DEVICE constexpr bool contains(int64_t block, int64_t own_block) const {
    return block < initial || (block <= own_block && block > own_block - local);
  }
};

}  // namespace nsa
