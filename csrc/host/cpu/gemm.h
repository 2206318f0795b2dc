// Row-major matrix products on raw memory, computed by ATen's BLAS. Inside a parallel region each runs on its own
// thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace nsa::cpu {

// A matrix whose rows are `stride` elements apart.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
};

// c (m, n) = a (m, k) b (n, k)^T
template <typename T>
void multiply_nt(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<T> c);

// c (m, n) = a (m, k) b (k, n), or c += with accumulate
template <typename T>
void multiply_nn(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<T> c, bool accumulate);

// c (m, n) += a (k, m)^T b (k, n)
template <typename T>
void accumulate_tn(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<T> c);

}  // namespace nsa::cpu
