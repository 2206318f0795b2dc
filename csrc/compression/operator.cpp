// compress and compress_backward: checks, shapes, and the registrations of every backend.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "common/geometry.h"
#include "compression/cpu/phi.h"
#if defined(NSA_CUDA_VERSION)
#include "compression/cuda/phi.h"
#endif
#include "host/backend.h"
#include "host/checks.h"
#include "host/options.h"
#include "host/results.h"

namespace nsa {
namespace {

void check_weight(const char* name, const OptionalTensor& weight, const at::Tensor& x, c10::SymIntArrayRef shape,
                  const char* meaning) {
  if (!weight.has_value()) {
    return;
  }
  check_like(name, *weight, "x", x);
  if (weight->dim() == static_cast<int64_t>(shape.size()) + 1) {
    c10::SymDimVector per_head(shape.begin(), shape.end());
    per_head.insert(per_head.begin(), x.sym_size(-2));
    check_shape(name, *weight, per_head, meaning);
  } else {
    check_shape(name, *weight, shape, meaning);
  }
}

// Rows of w1 or w2, or what the caller got wrong.
c10::SymInt rows_of(const char* name, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2 || weight.dim() == 3, name, " must be a matrix, or one per KV head, got shape ",
                    weight.sym_sizes());
  return weight.sym_size(-2);
}

// Checks everything; returns the width D' of the result.
c10::SymInt check_compress(const at::Tensor& x, const PhiWeights& weights, int64_t block_size, int64_t block_stride,
                           const Packing& packing) {
  check_floating("x", x);
  check_block_sizes(block_size, block_stride);
  const int64_t dims = packing.packed() ? 3 : 4;
  TORCH_CHECK_VALUE(x.dim() == dims, "x must be ",
                    packing.packed() ? "packed, (sum T, Hkv, D), with cu_seqlens_k" : "(B, T, Hkv, D)", ", got shape ",
                    x.sym_sizes());
  TORCH_CHECK_VALUE(x.sym_size(-1) >= 1 && x.sym_size(-2) >= 1,
                    "x must have at least one head and one channel, got shape ", x.sym_sizes());
  check_maximum("max_seqlen_k", packing.max_seqlen_k);
  if (packing.packed()) {
    check_cumulative_vector("cu_seqlens_k", *packing.cu_seqlens_k, "x", x);
  }
  const c10::SymInt width = x.sym_size(-1);
  if (!weights.w1.has_value()) {
    for (const auto& [name, weight] :
         {std::pair{"pe", &weights.pe}, {"b1", &weights.b1}, {"w2", &weights.w2}, {"b2", &weights.b2}}) {
      TORCH_CHECK_VALUE(!weight->has_value(), name,
                        " must come with w1 (without weights the result is the mean), got it alone");
    }
    return width;
  }
  TORCH_CHECK_VALUE(weights.w2.has_value() || !weights.b2.has_value(), "b2 must come with w2, got it alone");
  const c10::SymInt hidden = rows_of("w1", *weights.w1);
  check_weight("pe", weights.pe, x, {block_size, width}, "(block_size, D), or one per KV head");
  check_weight("w1", weights.w1, x, {hidden, width * block_size}, "(hidden, block_size * D), or one per KV head");
  check_weight("b1", weights.b1, x, {hidden}, "(hidden,), or one per KV head");
  if (!weights.w2.has_value()) {
    return hidden;
  }
  const c10::SymInt result = rows_of("w2", *weights.w2);
  check_weight("w2", weights.w2, x, {result, hidden}, "(D', hidden), or one per KV head");
  check_weight("b2", weights.b2, x, {result}, "(D',), or one per KV head");
  return result;
}

c10::SymDimVector output_shape(const at::Tensor& x, const c10::SymInt& width, int64_t block_size, int64_t block_stride,
                               const Packing& packing) {
  const c10::SymInt tokens = x.sym_size(-3);
  if (packing.packed()) {
    return {tokens / block_stride, x.sym_size(-2), width};
  }
  const c10::SymInt blocks =
      tokens < block_size ? c10::SymInt(0) : (tokens - block_size) / block_stride + c10::SymInt(1);
  return {x.sym_size(0), blocks, x.sym_size(-2), width};
}

Packing key_packing(const OptionalTensor& cu_seqlens_k, const std::optional<c10::SymInt>& max_seqlen_k) {
  return {cu_seqlens_k, cu_seqlens_k, max_seqlen_k, max_seqlen_k, std::nullopt};
}

// float16 and bfloat16 are computed in float32, and rounded once at the end.
at::Tensor widen(const at::Tensor& tensor) {
  return tensor.to(tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

PhiWeights widen(const PhiWeights& weights) {
  const auto each = [](const OptionalTensor& weight) {
    return weight.has_value() ? OptionalTensor(widen(*weight)) : std::nullopt;
  };
  return {each(weights.pe), each(weights.w1), each(weights.b1), each(weights.w2), each(weights.b2)};
}

// On the CPU the lengths can be read, so wrong ones are refused.
void check_lengths(const at::Tensor& x, const Packing& packing) {
  if (packing.packed()) {
    check_cumulative_lengths("cu_seqlens_k", *packing.cu_seqlens_k, x.size(-3), "max_seqlen_k", packing.max_seqlen_k);
  }
}

template <Backend backend>
at::Tensor compress(const at::Tensor& x, const OptionalTensor& pe, const OptionalTensor& w1, const OptionalTensor& b1,
                    const OptionalTensor& w2, const OptionalTensor& b2, int64_t block_size, int64_t block_stride,
                    const OptionalTensor& cu_seqlens_k, std::optional<c10::SymInt> max_seqlen_k) {
  const PhiWeights weights{pe, w1, b1, w2, b2};
  const Packing packing = key_packing(cu_seqlens_k, max_seqlen_k);
  const c10::SymInt width = check_compress(x, weights, block_size, block_stride, packing);
  const c10::SymDimVector shape = output_shape(x, width, block_size, block_stride, packing);
  if constexpr (backend == Backend::kCpu) {
    check_lengths(x, packing);
    if (c10::multiply_integers(C10_AS_INTARRAYREF_SLOW(shape)) > 0) {
      return phi_forward(widen(x), widen(weights), block_size, block_stride, packing).to(x.scalar_type());
    }
  }
  const at::Tensor out = at::empty_symint(shape, x.options());
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    cuda::phi_forward(x, weights, block_size, block_stride, packing, out);
  }
#endif
  return out;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <Backend backend>
Gradients compress_backward(const at::Tensor& grad_out, const at::Tensor& x, const OptionalTensor& pe,
                            const OptionalTensor& w1, const OptionalTensor& b1, const OptionalTensor& w2,
                            const OptionalTensor& b2, std::array<bool, 6> output_mask, int64_t block_size,
                            int64_t block_stride, const OptionalTensor& cu_seqlens_k,
                            std::optional<c10::SymInt> max_seqlen_k) {
  const PhiWeights weights{pe, w1, b1, w2, b2};
  const PhiMask wanted{output_mask[0],
                       output_mask[1] && pe.has_value(),
                       output_mask[2] && w1.has_value(),
                       output_mask[3] && b1.has_value(),
                       output_mask[4] && w2.has_value(),
                       output_mask[5] && b2.has_value()};
  const Packing packing = key_packing(cu_seqlens_k, max_seqlen_k);
  const c10::SymInt width = check_compress(x, weights, block_size, block_stride, packing);
  check_like("grad_out", grad_out, "x", x);
  check_shape("grad_out", grad_out, output_shape(x, width, block_size, block_stride, packing),
              "the shape of the result");
  PhiGradients grads;
  if constexpr (backend == Backend::kCpu) {
    check_lengths(x, packing);
    grads = phi_backward(widen(grad_out), widen(x), widen(weights), block_size, block_stride, packing, wanted);
  }
#if defined(NSA_CUDA_VERSION)
  if constexpr (backend == Backend::kCuda) {
    grads = cuda::phi_backward(grad_out, x, weights, block_size, block_stride, packing, wanted);
  }
#endif
  const auto result = [&](const at::Tensor& grad, const OptionalTensor& of, bool asked_for) {
    if (!asked_for) {
      return or_nothing(at::Tensor(), x);
    }
    return backend != Backend::kMeta ? grad.to(x.scalar_type()).contiguous()
                                     : at::empty_symint(of->sym_sizes(), x.options());
  };
  return {result(grads.x, x, wanted.x),    result(grads.pe, pe, wanted.pe), result(grads.w1, w1, wanted.w1),
          result(grads.b1, b1, wanted.b1), result(grads.w2, w2, wanted.w2), result(grads.b2, b2, wanted.b2)};
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CPU, m) {
  m.impl("compress", compress<Backend::kCpu>);
  m.impl("compress_backward", compress_backward<Backend::kCpu>);
}

#if defined(NSA_CUDA_VERSION)
TORCH_LIBRARY_IMPL(nsa, CUDA, m) {
  m.impl("compress", compress<Backend::kCuda>);
  m.impl("compress_backward", compress_backward<Backend::kCuda>);
}
#endif

TORCH_LIBRARY_IMPL(nsa, Meta, m) {
  m.impl("compress", compress<Backend::kMeta>);
  m.impl("compress_backward", compress_backward<Backend::kMeta>);
}

}  // namespace nsa
