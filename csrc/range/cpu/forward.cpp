// out = softmax(scale q k^T) v over the range of keys that each query sees.
// A task takes a tile of queries of one KV head and walks the keys in chunks: S = Q K^T, softmax, O += P V.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>

#include "host/cpu/chunks.h"
#include "host/cpu/parallel.h"
#include "host/cpu/tile.h"
#include "range/cpu/kernels.h"

namespace nsa::cpu {
namespace {

template <typename T, typename Keys>
void forward_tile(const TileSpan& span, const Keys& keys, const Rows<const T>& q, const Rows<const T>& k,
                  const Rows<const T>& v, int64_t dk, int64_t dv, T scale, const Rows<T>& out, const Rows<T>& lse) {
  const int64_t kv_head = span.head / span.group;
  Buffer<T> queries(span.rows() * dk);
  Buffer<T> scores(span.rows() * kKeysPerChunk);
  OnlineSoftmax<T> softmax(span.rows(), dv);
  load_tile(span, q, dk, scale, queries.data());

  for_each_chunk(span, keys, [&](const Chunk& chunk) {
    const int64_t first_row = chunk.token_begin * span.group;
    const int64_t rows = (chunk.token_end - chunk.token_begin) * span.group;
    const int64_t key_row = keys.first_row(*span.sequence) + chunk.keys.begin;
    const int64_t width = chunk.keys.end - chunk.keys.begin;
    const Matrix<const T> k_chunk{k.at(span.sequence->batch, key_row, kv_head), k.token_stride};
    const Matrix<const T> v_chunk{v.at(span.sequence->batch, key_row, kv_head), v.token_stride};
    multiply_nt<T>(rows, width, dk, {queries.data() + first_row * dk, dk}, k_chunk, {scores.data(), width});
    for (int64_t r = 0; r < rows; ++r) {
      const KeyRange seen = visible_in_chunk(span, keys, chunk, chunk.token_begin + r / span.group);
      T* row = scores.data() + r * width;
      std::fill(row, row + seen.begin, T(0));
      std::fill(row + seen.end, row + width, T(0));
      const T factor = softmax.add_scores(first_row + r, row + seen.begin, seen.end - seen.begin);
      if (factor != T(1)) {
        row_scale(softmax.out(first_row + r), dv, factor);
      }
    }
    multiply_nn<T>(rows, dv, width, {scores.data(), width}, v_chunk, softmax.out_matrix(first_row), true);
  });
  softmax.store(span, out, lse);
}

template <typename T, typename Keys>
void forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
             const std::vector<SequencePlace>& sequences, const Keys& keys, const at::Tensor& out,
             const at::Tensor& lse) {
  const int64_t kv_heads = k.size(-2);
  const int64_t group = q.size(-2) / kv_heads;
  const std::vector<TileSpan> tiles = list_tiles(sequences, kv_heads, group, tokens_per_tile(group));
  for_each_task(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    forward_tile<T>(tiles[i], keys, read_rows<T>(q), read_rows<T>(k), read_rows<T>(v), q.size(-1), v.size(-1),
                    static_cast<T>(scale), write_rows<T>(out), write_lse<T>(lse));
  });
}

}  // namespace

template <typename Keys>
void range_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                             const std::vector<SequencePlace>& sequences, const Keys& keys, const at::Tensor& out,
                             const at::Tensor& lse) {
  const at::ScalarType type = lse.scalar_type();
  const at::Tensor result = out.scalar_type() == type ? out : at::empty(out.sizes(), out.options().dtype(type));
  AT_DISPATCH_FLOATING_TYPES(type, "range_attention_forward", [&] {
    forward<scalar_t>(readable(q, type), readable(k, type), readable(v, type), scale, sequences, keys, result, lse);
  });
  if (!result.is_same(out)) {
    out.copy_(result);
  }
}

template void range_attention_forward(const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                                      const std::vector<SequencePlace>&, const CompressedKeys&, const at::Tensor&,
                                      const at::Tensor&);
template void range_attention_forward(const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                                      const std::vector<SequencePlace>&, const WindowKeys&, const at::Tensor&,
                                      const at::Tensor&);

}  // namespace nsa::cpu
