// With P = exp(scale q k^T - lse), delta = <dO, O> - dlse and dS = P * (dO v^T - delta):
//   dv = P^T dO,   dq = scale dS k,   dk = scale dS^T q.
// What is not asked for is not computed: its rows have no data.
// A task walks the tiles of one KV head in order and adds to that head's dk and dv (key_gradients.h).
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>

#include "host/cpu/chunks.h"
#include "host/cpu/key_gradients.h"
#include "host/cpu/parallel.h"
#include "host/cpu/tile.h"
#include "range/cpu/kernels.h"

namespace nsa::cpu {
namespace {

template <typename T>
void clear_unseen(T* row, const KeyRange& seen, int64_t width) {
  std::fill(row, row + seen.begin, T(0));
  std::fill(row + seen.end, row + width, T(0));
}

template <typename T, typename Keys>
void backward_tile(const TileSpan& span, const Keys& keys, const BackwardInputs<T>& in, const KeyRows<T>& key_rows,
                   const Rows<T>& grad_q) {
  const int64_t kv_head = span.head / span.group;
  const int64_t batch = span.sequence->batch;
  const bool wants_scores = grad_q.data != nullptr || key_rows.grad_k.data != nullptr;
  BackwardTile<T> tile(span, in);
  Buffer<T> weights(span.rows() * kKeysPerChunk);
  Buffer<T> grad_scores(span.rows() * kKeysPerChunk);

  for_each_chunk(span, keys, [&](const Chunk& chunk) {
    const int64_t first_row = chunk.token_begin * span.group;
    const int64_t rows = (chunk.token_end - chunk.token_begin) * span.group;
    const int64_t key_row = keys.first_row(*span.sequence) + chunk.keys.begin;
    const int64_t width = chunk.keys.end - chunk.keys.begin;
    const auto chunk_of = [&](const auto& tensor) { return tensor.at(batch, key_row, kv_head); };
    const Matrix<const T> q{tile.q.data() + first_row * in.dk, in.dk};
    const Matrix<const T> grad_out{tile.grad_out.data() + first_row * in.dv, in.dv};
    const Matrix<const T> k{chunk_of(key_rows.k), key_rows.k.token_stride};
    const Matrix<const T> v{chunk_of(key_rows.v), key_rows.v.token_stride};
    multiply_nt<T>(rows, width, in.dk, q, k, {weights.data(), width});
    if (wants_scores) {
      multiply_nt<T>(rows, width, in.dv, grad_out, v, {grad_scores.data(), width});
    }
    for (int64_t r = 0; r < rows; ++r) {
      const KeyRange seen = visible_in_chunk(span, keys, chunk, chunk.token_begin + r / span.group);
      T* p = weights.data() + r * width;
      T* ds = grad_scores.data() + r * width;
      row_exp(p + seen.begin, seen.end - seen.begin, tile.lse[first_row + r]);
      clear_unseen(p, seen, width);
      if (wants_scores) {
        row_softmax_backward(ds + seen.begin, p + seen.begin, seen.end - seen.begin, tile.delta[first_row + r],
                             tile.grad_lse[first_row + r]);
        clear_unseen(ds, seen, width);
      }
    }
    const Matrix<const T> p{weights.data(), width};
    const Matrix<const T> ds{grad_scores.data(), width};
    if (grad_q.data != nullptr) {
      multiply_nn<T>(rows, in.dk, width, ds, k, {tile.grad_q.data() + first_row * in.dk, in.dk}, true);
    }
    if (key_rows.grad_k.data != nullptr) {
      accumulate_tn<T>(width, in.dk, rows, ds, q, {chunk_of(key_rows.grad_k), key_rows.grad_k.token_stride});
    }
    if (key_rows.grad_v.data != nullptr) {
      accumulate_tn<T>(width, in.dv, rows, p, grad_out, {chunk_of(key_rows.grad_v), key_rows.grad_v.token_stride});
    }
  });
  if (grad_q.data != nullptr) {
    store_tile(span, tile.grad_q.data(), in.dk, in.scale, grad_q);
  }
}

template <typename T, typename Keys>
void backward(const BackwardInputs<T>& in, const at::Tensor& k, const at::Tensor& v, int64_t group,
              const std::vector<SequencePlace>& sequences, const Keys& keys, const GradientSums& sums, int64_t splits) {
  const std::vector<BackwardTask> tasks = list_backward_tasks(sequences, k.size(-2), splits);
  for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const BackwardTask& task = tasks[i];
    const KeyRows<T> key_rows = sums.key_rows<T>(k, v, task.split);
    const int64_t end = task.first + task.count;
    for (int64_t first = task.first; first < end; first += tokens_per_tile(group)) {
      const TileSpan span{task.sequence, first, std::min(tokens_per_tile(group), end - first), task.kv_head * group,
                          group};
      backward_tile<T>(span, keys, in, key_rows, sums.grad_q<T>());
    }
  });
}

}  // namespace

template <typename Keys>
AttentionGradients range_attention_backward(const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse,
                                            const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                            const at::Tensor& out, const at::Tensor& lse, double scale,
                                            const std::vector<SequencePlace>& sequences, const Keys& keys,
                                            const GradientMask& wanted) {
  const at::ScalarType type = lse.scalar_type();
  const BackwardOperands operands(grad_out, q, k, v, out, type);
  const int64_t splits = num_splits(sequences, k.size(-2));
  const GradientSums sums(operands.q, operands.k, operands.v, wanted, splits);
  AT_DISPATCH_FLOATING_TYPES(type, "range_attention_backward", [&] {
    backward<scalar_t>(operands.inputs<scalar_t>(lse, grad_lse, scale), operands.k, operands.v, q.size(-2) / k.size(-2),
                       sequences, keys, sums, splits);
  });
  return sums.total(q.scalar_type());
}

template AttentionGradients range_attention_backward(const at::Tensor&, const std::optional<at::Tensor>&,
                                                     const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                     const at::Tensor&, const at::Tensor&, double,
                                                     const std::vector<SequencePlace>&, const CompressedKeys&,
                                                     const GradientMask&);
template AttentionGradients range_attention_backward(const at::Tensor&, const std::optional<at::Tensor>&,
                                                     const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                     const at::Tensor&, const at::Tensor&, double,
                                                     const std::vector<SequencePlace>&, const WindowKeys&,
                                                     const GradientMask&);

}  // namespace nsa::cpu
