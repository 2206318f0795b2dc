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
                                 const at::Tensor& v, const Packing& packing, const GradientMask& wanted,
                                 const at::Tensor& grad_q)
    : q(readable(q)),
      k(readable(k)),
      v(readable(v)),
      grad_out(readable(grad_out)),
      add_to_grad_q(false),
      packing_(packing),
      wanted_(wanted),
      given_(grad_q.defined()) {
  if (wanted[0]) {
    dq_ = given_ ? grad_q : at::empty(q.sizes(), q.options());
    this->grad_q = writable(dq_);
    add_to_grad_q = given_ && this->grad_q.is_same(dq_);
  }
  if (wanted[1] || wanted[2]) {
    dk_ = empty_key_gradient(k, packing.packed());
    dv_ = empty_key_gradient(v, packing.packed());
    grad_k = writable(dk_);
    grad_v = writable(dv_);
  }
}

AttentionGradients GradientTensors::wanted() const {
  return {dq_, wanted_[1] ? dk_ : at::Tensor(), wanted_[2] ? dv_ : at::Tensor()};
}

AttentionGradients GradientTensors::zeros() const {
  for (const at::Tensor& gradient : {given_ ? at::Tensor() : dq_, dk_, dv_}) {
    if (gradient.defined()) {
      gradient.zero_();
    }
  }
  return wanted();
}

AttentionGradients GradientTensors::finish() const {
  if (dk_.defined()) {
    copy_back(grad_k, dk_);
    copy_back(grad_v, dv_);
  }
  if (!dq_.defined()) {
    return wanted();
  }
  if (given_ && !add_to_grad_q) {
    dq_.add_(grad_q.narrow(-1, 0, dq_.size(-1)));
  } else {
    copy_back(grad_q, dq_);
  }
  if (!given_) {
    fill_unused_rows(packing_, {{dq_}});
  }
  return wanted();
}

}  // namespace nsa::cuda
