// As in range/cpu/backward.cpp, block by block with gathered rows:
//   dv_j += P^T dO,   dk_j += scale dS^T q,   and scale dS k_j is added to each row's dq.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>

#include "host/cpu/key_gradients.h"
#include "host/cpu/parallel.h"
#include "host/cpu/tile.h"
#include "selected/cpu/block_lists.h"
#include "selected/cpu/kernels.h"

namespace nsa::cpu {
namespace {

// Reused from block to block: the gathered rows, and what is computed of them.
template <typename T>
struct Scratch {
  Buffer<T> q, grad_out, weights, grad_scores, grad_q;

  Scratch(int64_t rows, int64_t dk, int64_t dv, int64_t select_size)
      : q(rows * dk),
        grad_out(rows * dv),
        weights(rows * select_size),
        grad_scores(rows * select_size),
        grad_q(rows * dk) {}
};

// Adds what was computed of gathered tokens, `width` numbers each, to the tile's.
template <typename T>
void scatter_add(const BlockGroup& group, int64_t width, const T* gathered, T* tile) {
  for (int64_t i = 0; i < group.num_tokens; ++i) {
    row_add(tile + group.tokens[i] * width, gathered + i * width, width);
  }
}

template <typename T>
void backward_tile(const TileSpan& span, const BlockLists& lists, const BackwardInputs<T>& in,
                   const KeyRows<T>& key_rows, const Rows<T>& grad_q) {
  const int64_t kv_head = span.head / span.group;
  const int64_t batch = span.sequence->batch;
  const bool wants_scores = grad_q.data != nullptr || key_rows.grad_k.data != nullptr;
  BackwardTile<T> tile(span, in);
  Scratch<T> scratch(std::min(std::max(kRowsPerProduct, span.group), span.rows()), in.dk, in.dv, lists.select_size);

  for_each_block(span, lists, [&](const BlockGroup& group) {
    const int64_t rows = group.num_tokens * span.group;
    const int64_t width = group.keys.end - group.keys.begin;
    const auto block_of = [&](const auto& tensor) {
      return tensor.at(batch, span.sequence->k_begin + group.keys.begin, kv_head);
    };
    const Matrix<const T> k{block_of(key_rows.k), key_rows.k.token_stride};
    const Matrix<const T> v{block_of(key_rows.v), key_rows.v.token_stride};
    const Matrix<const T> q{scratch.q.data(), in.dk};
    const Matrix<const T> grad_out{scratch.grad_out.data(), in.dv};
    gather(group, span.group, in.dk, tile.q.data(), scratch.q.data());
    gather(group, span.group, in.dv, tile.grad_out.data(), scratch.grad_out.data());
    multiply_nt<T>(rows, width, in.dk, q, k, {scratch.weights.data(), width});
    if (wants_scores) {
      multiply_nt<T>(rows, width, in.dv, grad_out, v, {scratch.grad_scores.data(), width});
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = group.tokens[r / span.group];
      const int64_t row = token * span.group + r % span.group;
      const int64_t seen = std::min(span.position(token) + 1 - group.keys.begin, width);
      T* p = scratch.weights.data() + r * width;
      T* ds = scratch.grad_scores.data() + r * width;
      row_exp(p, seen, tile.lse[row]);
      std::fill(p + seen, p + width, T(0));
      if (wants_scores) {
        row_softmax_backward(ds, p, seen, tile.delta[row], tile.grad_lse[row]);
        std::fill(ds + seen, ds + width, T(0));
      }
    }
    const Matrix<const T> p{scratch.weights.data(), width};
    const Matrix<const T> ds{scratch.grad_scores.data(), width};
    if (grad_q.data != nullptr) {
      multiply_nn<T>(rows, in.dk, width, ds, k, {scratch.grad_q.data(), in.dk}, false);
      scatter_add(group, span.group * in.dk, scratch.grad_q.data(), tile.grad_q.data());
    }
    if (key_rows.grad_k.data != nullptr) {
      accumulate_tn<T>(width, in.dk, rows, ds, q, {block_of(key_rows.grad_k), key_rows.grad_k.token_stride});
    }
    if (key_rows.grad_v.data != nullptr) {
      accumulate_tn<T>(width, in.dv, rows, p, grad_out, {block_of(key_rows.grad_v), key_rows.grad_v.token_stride});
    }
  });
  if (grad_q.data != nullptr) {
    store_tile(span, tile.grad_q.data(), in.dk, in.scale, grad_q);
  }
}

}  // namespace

AttentionGradients selected_attention_backward(const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse,
                                               const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                               const at::Tensor& block_indices, const at::Tensor& out,
                                               const at::Tensor& lse, int64_t select_size, double scale,
                                               const std::vector<SequencePlace>& sequences,
                                               const GradientMask& wanted) {
  const at::ScalarType type = lse.scalar_type();
  const BackwardOperands operands(grad_out, q, k, v, out, type);
  const at::Tensor indices = block_indices.contiguous();
  const BlockLists lists{read_rows<int32_t>(indices), indices.size(-1), select_size};
  const int64_t kv_heads = k.size(-2);
  const int64_t group = q.size(-2) / kv_heads;
  const int64_t tokens = tokens_per_selected_tile(group, ceil_div(k.size(-3), select_size), lists.per_token);
  const int64_t splits = num_splits(sequences, kv_heads);
  const std::vector<BackwardTask> tasks = list_backward_tasks(sequences, kv_heads, splits);
  const GradientSums sums(operands.q, operands.k, operands.v, wanted, splits);
  AT_DISPATCH_FLOATING_TYPES(type, "selected_attention_backward", [&] {
    const BackwardInputs<scalar_t> in = operands.inputs<scalar_t>(lse, grad_lse, scale);
    for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      const BackwardTask& task = tasks[i];
      const KeyRows<scalar_t> key_rows = sums.key_rows<scalar_t>(operands.k, operands.v, task.split);
      const int64_t end = task.first + task.count;
      for (int64_t first = task.first; first < end; first += tokens) {
        const TileSpan span{task.sequence, first, std::min(tokens, end - first), task.kv_head * group, group};
        backward_tile<scalar_t>(span, lists, in, key_rows, sums.grad_q<scalar_t>());
      }
    });
  });
  return sums.total(q.scalar_type());
}

}  // namespace nsa::cpu
