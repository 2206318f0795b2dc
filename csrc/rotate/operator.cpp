// rotate: checks, result, and the registrations of every backend.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "host/backend.h"
#include "host/checks.h"
#if defined(NSA_CUDA_VERSION)
#include "rotate/cuda/call.h"
#endif

namespace nsa {
namespace {

// One row of angles for each token: of x's dimensions, heads of size 1.
at::Tensor expand_angles(const char* name, const at::Tensor& angles, const at::Tensor& x) {
  check_floating(name, angles);
  check_same_device(name, angles, "x", x);
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end());
  shape[shape.size() - 2] = 1;
  TORCH_CHECK_VALUE(angles.dim() >= 2 && angles.sym_size(-1) == shape.back() && angles.sym_size(-2) == 1, name,
                    " must be (B, T, 1, D) or (T, 1, D) with the head dimension ", shape.back(), " of x, got shape ",
                    angles.sym_sizes());
  return angles.expand_symint(shape);
}

// In the wider dtype of the two, as torch promotes it.
at::Tensor compose(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed) {
  const at::Tensor a = x.chunk(2, -1)[0];
  const at::Tensor b = x.chunk(2, -1)[1];
  const auto cosines = cos.chunk(2, -1);
  const auto sines = sin.chunk(2, -1);
  const at::Tensor first = transposed ? a * cosines[0] + b * sines[1] : a * cosines[0] - b * sines[0];
  const at::Tensor second = transposed ? b * cosines[1] - a * sines[0] : b * cosines[1] + a * sines[1];
  return at::cat({first, second}, -1).to(x.scalar_type());
}

template <Backend backend>
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed) {
  check_floating("x", x);
  TORCH_CHECK_VALUE(x.dim() == 3 || x.dim() == 4, "x must be (B, T, H, D) or packed (sum T, H, D), got shape ",
                    x.sym_sizes());
  TORCH_CHECK_VALUE(x.sym_size(-1) % 2 == 0, "x must have an even head dimension, got ", x.sym_size(-1));
  const at::Tensor cosines = expand_angles("cos", cos, x);
  const at::Tensor sines = expand_angles("sin", sin, x);
  if constexpr (backend == Backend::kCpu) {
    return compose(x, cosines, sines, transposed);
  }
  const at::Tensor out = at::empty_symint(x.sym_sizes(), x.options());
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    cuda::rotate(x, cosines, sines, transposed, out);
  }
#endif
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) { m.impl("rotate", rotate<Backend::kCpu>); }
TORCH_LIBRARY_IMPL(nsa, Meta, m) { m.impl("rotate", rotate<Backend::kMeta>); }
#if defined(NSA_CUDA_VERSION)
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { m.impl("rotate", rotate<Backend::kCuda>); }
#else
TORCH_LIBRARY_IMPL(nsa, CUDA, m) { m.impl("rotate", rotate<Backend::kCpu>); }  // torch's own ops, on the GPU
#endif

}  // namespace nsa
