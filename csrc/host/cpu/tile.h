// What the CPU attention kernels share: a tile of consecutive queries of one KV head, all heads of the group as rows
// (row = token * G + head), and the softmax that runs over it block of keys by block of keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "common/geometry.h"
#include "host/cpu/gemm.h"
#include "host/cpu/rows.h"
#include "host/cpu/vector.h"
#include "host/packing.h"

namespace nsa::cpu {

// Memory that is not zeroed first.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(new T[static_cast<size_t>(count)]) {}
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_[static_cast<size_t>(i)]; }
  const T& operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }

 private:
  std::unique_ptr<T[]> data_;
};

// The queries [first, first + tokens) of a sequence, for the heads [head, head + group).
struct TileSpan {
  const SequencePlace* sequence;
  int64_t first;
  int64_t tokens;
  int64_t head;
  int64_t group;

  int64_t rows() const { return tokens * group; }
  int64_t position(int64_t token) const { return sequence->offset + first + token; }

  template <typename T>
  T* row(const Rows<T>& tensor, int64_t row) const {
    return tensor.at(sequence->batch, sequence->q_begin + first + row / group, head + row % group);
  }
};

// Copies a tile's rows of `width` numbers, times a factor, into adjacent memory.
template <typename T>
void load_tile(const TileSpan& span, const Rows<const T>& from, int64_t width, T factor, T* to) {
  for (int64_t r = 0; r < span.rows(); ++r) {
    const T* source = span.row(from, r);
    for (int64_t c = 0; c < width; ++c) {
      to[r * width + c] = source[c] * factor;
    }
  }
}

template <typename T>
void store_tile(const TileSpan& span, const T* from, int64_t width, T factor, const Rows<T>& to) {
  for (int64_t r = 0; r < span.rows(); ++r) {
    T* target = span.row(to, r);
    for (int64_t c = 0; c < width; ++c) {
      target[c] = from[r * width + c] * factor;
    }
  }
}

// Softmax over keys that come block by block: the running maximum, the running sum of weights, and the sum of values so
// far.
template <typename T>
class OnlineSoftmax {
 public:
  OnlineSoftmax(int64_t rows, int64_t width) : width_(width), maximum_(rows), sum_(rows), out_(rows * width) {
    std::fill_n(maximum_.data(), rows, -std::numeric_limits<T>::infinity());
    std::fill_n(sum_.data(), rows, T(0));
    std::fill_n(out_.data(), rows * width, T(0));
  }

  // Turns n >= 1 scores of a row into weights in place. Returns the factor by which the row's sum of values must be
  // scaled before the weighted values are added to it.
  T add_scores(int64_t row, T* scores, int64_t n) {
    const T before = maximum_[row];
    const T now = std::max(before, row_max(scores, n));
    const T factor = before == now ? T(1) : std::exp(before - now);
    sum_[row] = sum_[row] * factor + row_exp(scores, n, now);
    maximum_[row] = now;
    return factor;
  }

  T* out(int64_t row) { return out_.data() + row * width_; }
  Matrix<T> out_matrix(int64_t row) { return {out(row), width_}; }

  // A row that saw no key gives output 0 and lse -inf.
  void store(const TileSpan& span, const Rows<T>& out_rows, const Rows<T>& lse_rows) {
    for (int64_t r = 0; r < span.rows(); ++r) {
      const bool empty = sum_[r] == T(0);
      const T inverse = empty ? T(0) : T(1) / sum_[r];
      T* target = span.row(out_rows, r);
      for (int64_t c = 0; c < width_; ++c) {
        target[c] = out(r)[c] * inverse;
      }
      *span.row(lse_rows, r) = empty ? -std::numeric_limits<T>::infinity() : maximum_[r] + std::log(sum_[r]);
    }
  }

 private:
  int64_t width_;
  Buffer<T> maximum_;
  Buffer<T> sum_;
  Buffer<T> out_;
};

// What the backward of every branch needs of a tile: q times scale, dO, lse and delta = <dO, O> - d lse.
template <typename T>
struct BackwardInputs {
  Rows<const T> q, out, grad_out, lse, grad_lse;  // grad_lse.data is null when nothing depends on lse
  T scale;
  int64_t dk, dv;
};

// The tensors behind them in the dtype of the computation, alive as long as the kernels run.
struct BackwardOperands {
  at::Tensor grad_out, q, k, v, out;

  BackwardOperands(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& out, at::ScalarType type)
      : grad_out(readable(grad_out, type)),
        q(readable(q, type)),
        k(readable(k, type)),
        v(readable(v, type)),
        out(readable(out, type)) {}

  template <typename T>
  BackwardInputs<T> inputs(const at::Tensor& lse, const std::optional<at::Tensor>& grad_lse, double scale) const {
    return {read_rows<T>(q),
            read_rows<T>(out),
            read_rows<T>(grad_out),
            read_lse<T>(lse),
            grad_lse.has_value() ? read_lse<T>(*grad_lse) : Rows<const T>{},
            static_cast<T>(scale),
            q.size(-1),
            v.size(-1)};
  }
};

template <typename T>
struct BackwardTile {
  Buffer<T> q, grad_out, lse, delta, grad_lse, grad_q;

  BackwardTile(const TileSpan& span, const BackwardInputs<T>& in)
      : q(span.rows() * in.dk),
        grad_out(span.rows() * in.dv),
        lse(span.rows()),
        delta(span.rows()),
        grad_lse(span.rows()),
        grad_q(span.rows() * in.dk) {
    load_tile(span, in.q, in.dk, in.scale, q.data());
    load_tile(span, in.grad_out, in.dv, T(1), grad_out.data());
    for (int64_t r = 0; r < span.rows(); ++r) {
      lse[r] = *span.row(in.lse, r);
      delta[r] = row_dot(grad_out.data() + r * in.dv, span.row(in.out, r), in.dv);
      grad_lse[r] = in.grad_lse.data == nullptr ? T(0) : *span.row(in.grad_lse, r);
      delta[r] -= grad_lse[r];
    }
    std::fill_n(grad_q.data(), span.rows() * in.dk, T(0));
  }
};

// The tiles of a call: every sequence and KV head, `tokens` queries each.
inline std::vector<TileSpan> list_tiles(const std::vector<SequencePlace>& sequences, int64_t kv_heads, int64_t group,
                                        int64_t tokens) {
  std::vector<TileSpan> tiles;
  for (const SequencePlace& sequence : sequences) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      for (int64_t first = 0; first < sequence.q_length; first += tokens) {
        tiles.push_back({&sequence, first, std::min<int64_t>(tokens, sequence.q_length - first), h * group, group});
      }
    }
  }
  return tiles;
}

}  // namespace nsa::cpu
