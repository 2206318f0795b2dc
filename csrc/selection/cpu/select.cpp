// p_cmp = exp(scale q k_cmp^T - lse), summed over the heads of a group; importance of a block by Eq. 9; the forced
// blocks and the most important others, in ascending order. A task takes a tile of queries of one KV head; it keeps the
// summed p_cmp of its own queries only.
#include "selection/cpu/select.h"

#include <ATen/Dispatch.h>

#include <algorithm>

#include "host/cpu/chunks.h"
#include "host/cpu/parallel.h"
#include "host/cpu/tile.h"

namespace nsa::cpu {
namespace {

struct CompressedKeysOnly {
  CompressedRange range;
  KeyRange visible(int64_t position) const { return range(position); }
};

// Summed over the group's heads: (tokens, blocks) for the blocks that the tile's last query sees.
template <typename T>
Buffer<T> group_probabilities(const TileSpan& span, const CompressedRange& range, const Rows<const T>& q,
                              const Rows<const T>& k, const Rows<const T>& lse, int64_t dk, T scale, int64_t blocks) {
  const int64_t kv_head = span.head / span.group;
  Buffer<T> probabilities(span.tokens * blocks);
  std::fill_n(probabilities.data(), span.tokens * blocks, T(0));
  Buffer<T> queries(span.rows() * dk);
  Buffer<T> scores(span.rows() * kKeysPerChunk);
  load_tile(span, q, dk, scale, queries.data());
  const CompressedKeysOnly keys{range};
  for_each_chunk(span, keys, [&](const Chunk& chunk) {
    const int64_t first_row = chunk.token_begin * span.group;
    const int64_t rows = (chunk.token_end - chunk.token_begin) * span.group;
    const int64_t width = chunk.keys.end - chunk.keys.begin;
    const Matrix<const T> k_chunk{k.at(span.sequence->batch, span.sequence->cmp_begin + chunk.keys.begin, kv_head),
                                  k.token_stride};
    multiply_nt<T>(rows, width, dk, {queries.data() + first_row * dk, dk}, k_chunk, {scores.data(), width});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = chunk.token_begin + r / span.group;
      const int64_t seen = visible_in_chunk(span, keys, chunk, token).end;
      T* row = scores.data() + r * width;
      row_exp(row, seen, *span.row(lse, first_row + r));
      row_add(probabilities.data() + token * blocks + chunk.keys.begin, row, seen);
    }
  });
  return probabilities;
}

// NaN counts as the lowest importance, so that the choice is always a valid list.
template <typename T>
T block_importance(const T* probabilities, int64_t visible, const BlockOverlap& overlap, int64_t block) {
  T importance = 0;
  const int64_t end = std::min(overlap.end(block), visible);
  for (int64_t m = overlap.first(block); m < end; ++m) {
    importance += probabilities[m] * static_cast<T>(overlap.count(m, block));
  }
  return std::isnan(importance) ? T(-1) : importance;
}

template <typename T>
void choose_blocks(const T* probabilities, int64_t position, const SelectionOptions& options,
                   const BlockOverlap& overlap, std::vector<T>& importance, std::vector<int32_t>& candidates,
                   int32_t* list) {
  const int64_t own_block = position / options.select_size;
  const int64_t visible = options.range(position).end;
  candidates.clear();
  int64_t chosen = 0;
  for (int64_t block = 0; block <= own_block; ++block) {
    if (options.forced.contains(block, own_block)) {
      list[chosen++] = static_cast<int32_t>(block);
    } else {
      importance[block] = block_importance(probabilities, visible, overlap, block);
      candidates.push_back(static_cast<int32_t>(block));
    }
  }
  const int64_t free = std::min<int64_t>(options.num_selected - chosen, static_cast<int64_t>(candidates.size()));
  const auto more_important = [&](int32_t a, int32_t b) {
    return importance[a] > importance[b] || (importance[a] == importance[b] && a < b);
  };
  if (free < static_cast<int64_t>(candidates.size())) {
    std::nth_element(candidates.begin(), candidates.begin() + free, candidates.end(), more_important);
  }
  std::copy_n(candidates.begin(), free, list + chosen);
  chosen += free;
  std::sort(list, list + chosen);
  std::fill(list + chosen, list + options.num_selected, -1);
}

template <typename T>
void select_tile(const TileSpan& span, const SelectionOptions& options, const Rows<const T>& q, const Rows<const T>& k,
                 const Rows<const T>& lse, int64_t dk, T scale, const Rows<int32_t>& block_indices) {
  const int64_t last = span.position(span.tokens - 1);
  const int64_t blocks = options.range(last).end;
  const Buffer<T> probabilities = group_probabilities(span, options.range, q, k, lse, dk, scale, blocks);
  const BlockOverlap overlap{options.range.block_size / options.range.block_stride,
                             options.select_size / options.range.block_stride};
  std::vector<T> importance(static_cast<size_t>(last / options.select_size) + 1);
  std::vector<int32_t> candidates;
  candidates.reserve(importance.size());
  for (int64_t t = 0; t < span.tokens; ++t) {
    int32_t* list =
        block_indices.at(span.sequence->batch, span.sequence->q_begin + span.first + t, span.head / span.group);
    choose_blocks(probabilities.data() + t * blocks, span.position(t), options, overlap, importance, candidates, list);
  }
}

}  // namespace

void select_blocks(const at::Tensor& q, const at::Tensor& k_cmp, const at::Tensor& lse, double scale,
                   const SelectionOptions& options, const std::vector<SequencePlace>& sequences,
                   const at::Tensor& block_indices) {
  const at::ScalarType type = lse.scalar_type();
  const at::Tensor q_read = readable(q, type);
  const at::Tensor k_read = readable(k_cmp, type);
  const int64_t kv_heads = k_cmp.size(-2);
  const int64_t group = q.size(-2) / kv_heads;
  const std::vector<TileSpan> tiles = list_tiles(sequences, kv_heads, group, tokens_per_tile(group));
  AT_DISPATCH_FLOATING_TYPES(type, "select_blocks", [&] {
    for_each_task(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
      select_tile<scalar_t>(tiles[i], options, read_rows<scalar_t>(q_read), read_rows<scalar_t>(k_read),
                            read_lse<scalar_t>(lse), q.size(-1), static_cast<scalar_t>(scale),
                            write_rows<int32_t>(block_indices));
    });
  });
}

}  // namespace nsa::cpu
