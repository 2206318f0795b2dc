// Where backward tasks add up dk and dv. Tiles of one KV head share keys, so one task walks them in order; when there
// are fewer heads than threads, the tiles are split among several tasks, each with its own sums, added up in a fixed
// order at the end: gradients do not depend on the timing of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host/cpu/rows.h"
#include "host/options.h"

namespace nsa::cpu {

// The queries [first, first + count) of one sequence and KV head; `split` numbers its sums.
struct BackwardTask {
  const SequencePlace* sequence;
  int64_t kv_head;
  int64_t first;
  int64_t count;
  int64_t split;
};

// More copies of dk and dv than this cost more memory than the threads are worth.
constexpr int64_t kMaxSplits = 16;

inline int64_t num_splits(const std::vector<SequencePlace>& sequences, int64_t kv_heads) {
  const int64_t tasks = std::max<int64_t>(static_cast<int64_t>(sequences.size()) * kv_heads, 1);
  return std::clamp<int64_t>((at::get_num_threads() + tasks - 1) / tasks, 1, kMaxSplits);
}

inline std::vector<BackwardTask> list_backward_tasks(const std::vector<SequencePlace>& sequences, int64_t kv_heads,
                                                     int64_t splits) {
  std::vector<BackwardTask> tasks;
  for (const SequencePlace& sequence : sequences) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      for (int64_t s = 0; s < splits; ++s) {
        const int64_t first = sequence.q_length * s / splits;
        const int64_t end = sequence.q_length * (s + 1) / splits;
        if (first < end) {
          tasks.push_back({&sequence, h, first, end - first, s});
        }
      }
    }
  }
  return tasks;
}

// The keys of a call and where one task's sums for them go.
template <typename T>
struct KeyRows {
  Rows<const T> k, v;
  Rows<T> grad_k, grad_v;
};

// The gradients of a call in the dtype of the computation, those that are asked for: dq, and dk and dv of every split,
// (splits, ...) in the shape of k and v. Rows of the others have no data.
class GradientSums {
 public:
  GradientSums(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const GradientMask& wanted,
               int64_t splits)
      : grad_q_(wanted[0] ? at::zeros(q.sizes(), q.options()) : at::Tensor()),
        grad_k_(wanted[1] ? zeros(k, splits) : at::Tensor()),
        grad_v_(wanted[2] ? zeros(v, splits) : at::Tensor()) {}

  template <typename T>
  Rows<T> grad_q() const {
    return grad_q_.defined() ? write_rows<T>(grad_q_) : Rows<T>{};
  }
  // The keys, and where a task's sums for them go.
  template <typename T>
  KeyRows<T> key_rows(const at::Tensor& k, const at::Tensor& v, int64_t split) const {
    return {read_rows<T>(k), read_rows<T>(v), of_split<T>(grad_k_, split), of_split<T>(grad_v_, split)};
  }
  AttentionGradients total(at::ScalarType type) const {
    return {grad_q_.defined() ? grad_q_.to(type) : grad_q_, total(grad_k_, type), total(grad_v_, type)};
  }

 private:
  static at::Tensor zeros(const at::Tensor& like, int64_t splits) {
    std::vector<int64_t> shape = like.sizes().vec();
    shape.insert(shape.begin(), splits);
    return at::zeros(shape, like.options());
  }
  static at::Tensor total(const at::Tensor& sums, at::ScalarType type) {
    return sums.defined() ? (sums.size(0) == 1 ? sums.select(0, 0) : sums.sum(0)).to(type) : sums;
  }
  template <typename T>
  static Rows<T> of_split(const at::Tensor& sums, int64_t split) {
    return sums.defined() ? write_rows<T>(sums.select(0, split)) : Rows<T>{};
  }

  at::Tensor grad_q_;
  at::Tensor grad_k_;
  at::Tensor grad_v_;
};

}  // namespace nsa::cpu
