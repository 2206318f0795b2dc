// rotate is linear in x: its gradient is the transposed rotation. Angles have no gradient.
#include "host/autograd.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace nsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor call_rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed) {
  static const auto op = find_op<decltype(call_rotate)>("nsa::rotate");
  return op.call(x, cos, sin, transposed);
}

class Rotate : public torch::autograd::Function<Rotate> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                            bool transposed) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["transposed"] = transposed;
    return call_rotate(x, cos, sin, transposed);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list angles = ctx->get_saved_variables();
    if (!grads[0].defined()) {
      return variable_list(4);
    }
    return {call_rotate(grads[0], angles[0], angles[1], !ctx->saved_data["transposed"].toBool()), {}, {}, {}};
  }
};

at::Tensor rotate_autograd(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool transposed) {
  return Rotate::apply(x, cos, sin, transposed);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, Autograd, m) { m.impl("rotate", rotate_autograd); }

}  // namespace nsa
