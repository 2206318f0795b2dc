#include "host/cpu/gemm.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/core/ScalarType.h>

namespace nsa::cpu {
namespace {

// ATen takes inputs as mutable tensors; it does not write to them.
template <typename T>
at::Tensor view(const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  return at::from_blob(const_cast<T*>(data), {rows, columns}, {row_stride, column_stride},
                       at::TensorOptions(c10::CppTypeToScalarType<T>::value));
}

}  // namespace

template <typename T>
void multiply_nt(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<T> c) {
  at::Tensor result = view(c.data, m, n, c.stride, 1);
  at::cpu::mm_out(result, view(a.data, m, k, a.stride, 1), view(b.data, k, n, 1, b.stride));
}

template <typename T>
void multiply_nn(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<T> c, bool accumulate) {
  at::Tensor result = view(c.data, m, n, c.stride, 1);
  at::cpu::addmm_out(result, result, view(a.data, m, k, a.stride, 1), view(b.data, k, n, b.stride, 1),
                     accumulate ? 1 : 0);
}

template <typename T>
void accumulate_tn(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<T> c) {
  at::Tensor result = view(c.data, m, n, c.stride, 1);
  at::cpu::addmm_out(result, result, view(a.data, m, k, 1, a.stride), view(b.data, k, n, b.stride, 1));
}

#define NSA_INSTANTIATE_GEMM(T)                                                                               \
  template void multiply_nt<T>(int64_t, int64_t, int64_t, Matrix<const T>, Matrix<const T>, Matrix<T>);       \
  template void multiply_nn<T>(int64_t, int64_t, int64_t, Matrix<const T>, Matrix<const T>, Matrix<T>, bool); \
  template void accumulate_tn<T>(int64_t, int64_t, int64_t, Matrix<const T>, Matrix<const T>, Matrix<T>);
NSA_INSTANTIATE_GEMM(float)
NSA_INSTANTIATE_GEMM(double)
#undef NSA_INSTANTIATE_GEMM

}  // namespace nsa::cpu
