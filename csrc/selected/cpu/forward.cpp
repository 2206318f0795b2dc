// out = softmax(scale q k^T) v over the keys j <= p of the blocks that each query lists.
// A task takes a tile of queries of one KV head, turns their lists round, and walks the blocks in ascending order: the
// rows that chose a block are gathered, S = Q K^T, softmax, and P V is added to each row's sum.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "host/cpu/parallel.h"
#include "host/cpu/tile.h"
#include "selected/cpu/block_lists.h"
#include "selected/cpu/kernels.h"

namespace nsa::cpu {
namespace {

template <typename T>
struct ForwardRows {
  Rows<const T> q, k, v;
  Rows<T> out, lse;
  int64_t dk, dv;
  T scale;
};

template <typename T>
void forward_tile(const TileSpan& span, const BlockLists& lists, const ForwardRows<T>& in) {
  const int64_t kv_head = span.head / span.group;
  const int64_t most_rows = std::min(std::max(kRowsPerProduct, span.group), span.rows());
  Buffer<T> queries(span.rows() * in.dk);
  Buffer<T> gathered(most_rows * in.dk);
  Buffer<T> scores(most_rows * lists.select_size);
  Buffer<T> values(most_rows * in.dv);
  Buffer<T> factors(most_rows);
  OnlineSoftmax<T> softmax(span.rows(), in.dv);
  load_tile(span, in.q, in.dk, in.scale, queries.data());

  for_each_block(span, lists, [&](const BlockGroup& group) {
    const int64_t rows = group.num_tokens * span.group;
    const int64_t width = group.keys.end - group.keys.begin;
    const int64_t key_row = span.sequence->k_begin + group.keys.begin;
    const Matrix<const T> k{in.k.at(span.sequence->batch, key_row, kv_head), in.k.token_stride};
    const Matrix<const T> v{in.v.at(span.sequence->batch, key_row, kv_head), in.v.token_stride};
    gather(group, span.group, in.dk, queries.data(), gathered.data());
    multiply_nt<T>(rows, width, in.dk, {gathered.data(), in.dk}, k, {scores.data(), width});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = group.tokens[r / span.group];
      const int64_t seen = std::min(span.position(token) + 1 - group.keys.begin, width);
      T* row = scores.data() + r * width;
      factors[r] = softmax.add_scores(token * span.group + r % span.group, row, seen);
      std::fill(row + seen, row + width, T(0));
    }
    multiply_nn<T>(rows, in.dv, width, {scores.data(), width}, v, {values.data(), in.dv}, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = group.tokens[r / span.group] * span.group + r % span.group;
      row_scale_add(softmax.out(row), values.data() + r * in.dv, in.dv, factors[r]);
    }
  });
  softmax.store(span, in.out, in.lse);
}

}  // namespace

void check_block_lists(const at::Tensor& block_indices, const std::vector<SequencePlace>& sequences,
                       int64_t select_size) {
  const at::Tensor lists = block_indices.contiguous();
  const Rows<const int32_t> rows = read_rows<int32_t>(lists);
  const int64_t per_token = lists.size(-1);
  const int64_t kv_heads = lists.size(-2);
  for (const SequencePlace& sequence : sequences) {
    const int64_t num_blocks = ceil_div(sequence.k_length, select_size);
    std::vector<int64_t> last_list(static_cast<size_t>(num_blocks), -1);
    for (int64_t t = 0; t < sequence.q_length * kv_heads; ++t) {
      const int32_t* list = rows.at(sequence.batch, sequence.q_begin + t / kv_heads, t % kv_heads);
      for (int64_t i = 0; i < per_token; ++i) {
        const int32_t block = list[i];
        TORCH_CHECK_VALUE(-1 <= block && block < num_blocks,
                          "block_indices must lie between -1 and the number of blocks, ", num_blocks,
                          ", exclusive, got ", block);
        if (block >= 0) {
          TORCH_CHECK_VALUE(last_list[block] != t, "block_indices must not list a block twice for one query, got ",
                            block, " twice");
          last_list[block] = t;
        }
      }
    }
  }
}

void selected_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& block_indices, int64_t select_size, double scale,
                                const std::vector<SequencePlace>& sequences, const at::Tensor& out,
                                const at::Tensor& lse) {
  const at::ScalarType type = lse.scalar_type();
  const at::Tensor result = out.scalar_type() == type ? out : at::empty(out.sizes(), out.options().dtype(type));
  const at::Tensor indices = block_indices.contiguous();
  const BlockLists lists{read_rows<int32_t>(indices), indices.size(-1), select_size};
  const int64_t kv_heads = k.size(-2);
  const int64_t group = q.size(-2) / kv_heads;
  const int64_t tokens = tokens_per_selected_tile(group, ceil_div(k.size(-3), select_size), lists.per_token);
  const std::vector<TileSpan> tiles = list_tiles(sequences, kv_heads, group, tokens);
  const at::Tensor q_read = readable(q, type);
  const at::Tensor k_read = readable(k, type);
  const at::Tensor v_read = readable(v, type);
  AT_DISPATCH_FLOATING_TYPES(type, "selected_attention_forward", [&] {
    const ForwardRows<scalar_t> rows{read_rows<scalar_t>(q_read),
                                     read_rows<scalar_t>(k_read),
                                     read_rows<scalar_t>(v_read),
                                     write_rows<scalar_t>(result),
                                     write_lse<scalar_t>(lse),
                                     q.size(-1),
                                     v.size(-1),
                                     static_cast<scalar_t>(scale)};
    for_each_task(static_cast<int64_t>(tiles.size()),
                  [&](int64_t i) { forward_tile<scalar_t>(tiles[i], lists, rows); });
  });
  if (!result.is_same(out)) {
    out.copy_(result);
  }
}

}  // namespace nsa::cpu
