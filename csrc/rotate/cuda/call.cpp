#include "rotate/cuda/call.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include "host/cuda/params.h"
#include "rotate/cuda/launch.h"

namespace nsa::cuda {
namespace {

AnglesView angles_of(const at::Tensor& angles) {
  return {.data = angles.const_data_ptr<float>(),
          .batch_stride = angles.dim() == 4 ? angles.stride(0) : 0,
          .token_stride = angles.stride(-3)};
}

}  // namespace

void rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed, const at::Tensor& out) {
  const ElementType type = element_type("x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) {
    return;
  }
  const int64_t tokens = x.size(-3);
  const int64_t rows = x.dim() == 4 ? x.size(0) * tokens : tokens;
  TORCH_CHECK_VALUE(rows < 0x7fffffff, "x must have fewer than 2^31 tokens on CUDA, got ", rows);
  const at::Tensor x_read = unit_stride(x);
  const at::Tensor cos_read = unit_stride(cos.to(at::kFloat));
  const at::Tensor sin_read = unit_stride(sin.to(at::kFloat));
  const RotateParams params{.rows = static_cast<uint32_t>(rows),
                            .heads = static_cast<int32_t>(x.size(-2)),
                            .half = static_cast<int32_t>(x.size(-1) / 2),
                            .transposed = transposed,
                            .by_tokens = Divisor(static_cast<uint32_t>(tokens)),
                            .x = view_of(x_read),
                            .cos = angles_of(cos_read),
                            .sin = angles_of(sin_read),
                            .out = view_of(out)};
  launch_rotate(params, type, c10::cuda::getCurrentCUDAStream());
}

}  // namespace nsa::cuda
