// compress with gradients for x and every weight. Nothing is saved but the inputs: the hidden layer is computed again.
#include "host/autograd.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "host/options.h"

namespace nsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor call_compress(const at::Tensor& x, const OptionalTensor& pe, const OptionalTensor& w1,
                         const OptionalTensor& b1, const OptionalTensor& w2, const OptionalTensor& b2,
                         int64_t block_size, int64_t block_stride, const OptionalTensor& cu_seqlens_k,
                         std::optional<c10::SymInt> max_seqlen_k) {
  static const auto op = find_op<decltype(call_compress)>("nsa::compress");
  return op.call(x, pe, w1, b1, w2, b2, block_size, block_stride, cu_seqlens_k, max_seqlen_k);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients call_compress_backward(const at::Tensor& grad_out, const at::Tensor& x, const OptionalTensor& pe,
                                 const OptionalTensor& w1, const OptionalTensor& b1, const OptionalTensor& w2,
                                 const OptionalTensor& b2, std::array<bool, 6> output_mask, int64_t block_size,
                                 int64_t block_stride, const OptionalTensor& cu_seqlens_k,
                                 std::optional<c10::SymInt> max_seqlen_k) {
  static const auto op = find_op<decltype(call_compress_backward)>("nsa::compress_backward");
  return op.call(grad_out, x, pe, w1, b1, w2, b2, output_mask, block_size, block_stride, cu_seqlens_k, max_seqlen_k);
}

class Compress : public torch::autograd::Function<Compress> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& pe,
                            const OptionalTensor& w1, const OptionalTensor& b1, const OptionalTensor& w2,
                            const OptionalTensor& b2, int64_t block_size, int64_t block_stride,
                            const OptionalTensor& cu_seqlens_k, const std::optional<c10::SymInt>& max_seqlen_k) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    save_tensors(ctx, {x, pe, w1, b1, w2, b2, cu_seqlens_k});
    ctx->saved_data["block_size"] = block_size;
    ctx->saved_data["block_stride"] = block_stride;
    ctx->saved_data["max_seqlen_k"] = max_seqlen_k;
    return call_compress(x, pe, w1, b1, w2, b2, block_size, block_stride, cu_seqlens_k, max_seqlen_k);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const std::vector<OptionalTensor> saved = load_tensors(ctx);
    if (!grads[0].defined()) {
      return variable_list(10);
    }
    std::array<bool, 6> mask{};
    size_t edge = 0;  // only inputs that are there have one
    for (size_t i = 0; i < mask.size(); ++i) {
      mask[i] = saved[i].has_value() && ctx->needs_input_grad(edge++);
    }
    auto [x, pe, w1, b1, w2, b2] =
        call_compress_backward(grads[0], *saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], mask,
                               ctx->saved_data["block_size"].toInt(), ctx->saved_data["block_stride"].toInt(), saved[6],
                               load_optional_int(ctx, "max_seqlen_k"));
    variable_list result{x, pe, w1, b1, w2, b2, {}, {}, {}, {}};
    for (size_t i = 0; i < mask.size(); ++i) {
      result[i] = if_needed(result[i], mask[i]);
    }
    return result;
  }
};

at::Tensor compress_autograd(const at::Tensor& x, const OptionalTensor& pe, const OptionalTensor& w1,
                             const OptionalTensor& b1, const OptionalTensor& w2, const OptionalTensor& b2,
                             int64_t block_size, int64_t block_stride, const OptionalTensor& cu_seqlens_k,
                             std::optional<c10::SymInt> max_seqlen_k) {
  return Compress::apply(x, pe, w1, b1, w2, b2, block_size, block_stride, cu_seqlens_k, max_seqlen_k);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, Autograd, m) {
  m.impl("compress", compress_autograd);
  m.impl("compress_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace nsa
