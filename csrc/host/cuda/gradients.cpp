#include "host/cuda/gradients.h"

#include <ATen/Functions.h>

#include "host/cuda/params.h"

namespace nsa::cuda {
namespace {

at::Tensor empty_key_gradient(const at::Tensor& like, bool packed) {
  return packed ? at::zeros(like.sizes(), like.options()) : at::empty(like.sizes(), like.options());
}

}  // namespace

GradientTensors::GradientTensors(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v, const Packing& packing, const at::Tensor& grad_q)
    : q(readable(q)),
      k(readable(k)),
      v(readable(v)),
      grad_out(readable(grad_out)),
      packing_(packing),
      given_(grad_q.defined()),
      dq_(grad_q.defined() ? grad_q : at::empty(q.sizes(), q.options())),
      dk_(empty_key_gradient(k, packing.packed())),
      dv_(empty_key_gradient(v, packing.packed())) {
  this->grad_q = writable(dq_);
  grad_k = writable(dk_);
  grad_v = writable(dv_);
  add_to_grad_q = given_ && this->grad_q.is_same(dq_);
}

AttentionGradients GradientTensors::zeros() const {
  if (!given_) {
    dq_.zero_();
  }
  dk_.zero_();
  dv_.zero_();
  return {dq_, dk_, dv_};
}

AttentionGradients GradientTensors::finish() const {
  if (given_ && !add_to_grad_q) {
    dq_.add_(grad_q.narrow(-1, 0, dq_.size(-1)));
  } else {
    copy_back(grad_q, dq_);
  }
  copy_back(grad_k, dk_);
  copy_back(grad_v, dv_);
  if (!given_) {
    fill_unused_rows(packing_, {{dq_}});
  }
  return {dq_, dk_, dv_};
}

}  // namespace nsa::cuda
