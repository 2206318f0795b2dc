// Rows of a (batch, token, head, channel) tensor whose channels lie together, read in place.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "host/packing.h"

namespace nsa::cpu {

template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;

  T* at(int64_t batch, int64_t token, int64_t head) const {
    return data + batch * batch_stride + token * token_stride + head * head_stride;
  }
};

// `tensor` in dtype `type`, its channels adjacent and its tokens at least a row apart: itself where possible.
inline at::Tensor readable(const at::Tensor& tensor, at::ScalarType type) {
  at::Tensor result = tensor.to(type);
  const bool in_place = result.stride(-1) == 1 && result.stride(-3) >= result.size(-1);
  return in_place ? result : result.contiguous();
}

// Over (B, T, H, D) or packed (sum T, H, D).
template <typename T>
Rows<T> rows_of(T* data, const at::Tensor& tensor) {
  return {data, tensor.dim() == 4 ? tensor.stride(0) : 0, tensor.stride(-3), tensor.stride(-2)};
}
template <typename T>
Rows<const T> read_rows(const at::Tensor& tensor) {
  return rows_of(tensor.const_data_ptr<T>(), tensor);
}
template <typename T>
Rows<T> write_rows(const at::Tensor& tensor) {
  return rows_of(tensor.mutable_data_ptr<T>(), tensor);
}

// lse is (B, Hq, Tq) or (Hq, sum Tq): one number a row.
template <typename T>
Rows<T> lse_rows_of(T* data, const at::Tensor& lse) {
  return {data, lse.dim() == 3 ? lse.stride(0) : 0, lse.stride(-1), lse.stride(-2)};
}
template <typename T>
Rows<const T> read_lse(const at::Tensor& lse) {
  return lse_rows_of(lse.const_data_ptr<T>(), lse);
}
template <typename T>
Rows<T> write_lse(const at::Tensor& lse) {
  return lse_rows_of(lse.mutable_data_ptr<T>(), lse);
}

}  // namespace nsa::cpu
