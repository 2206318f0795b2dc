// h[m] = W1 vec(block_m + PE) + b1 = sum over i < l/d of W1_i chunk[m + i] + (W1 vec(PE) + b1),   out = W2 gelu(h) +
// b2. W1_i is the part of W1 that meets the i-th chunk of a block: one product of every chunk with all l/d parts, then
// shift and add, in place of l/d times the work and memory on unfolded blocks.
#include "compression/cpu/phi.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "compression/cpu/blocks.h"

namespace nsa {

at::Tensor sum_to(const at::Tensor& per_head, const at::Tensor& weight, int64_t shared_dim) {
  return (weight.dim() == shared_dim ? per_head.sum(0) : per_head).reshape(weight.sizes());
}

at::Tensor split_weight(const at::Tensor& w1, int64_t pieces) {
  const at::Tensor parts = w1.unflatten(-1, {pieces, -1}).transpose(-2, -3);
  return parts.flatten(-3, -2);
}

at::Tensor join_weight(const at::Tensor& parts, int64_t pieces) {
  return parts.unflatten(-2, {pieces, -1}).transpose(-2, -3).flatten(-2, -1);
}

PhiGradients zero_gradients(const at::Tensor& x, const PhiWeights& weights, const PhiMask& wanted) {
  const auto zeros = [](const std::optional<at::Tensor>& weight, bool asked_for) {
    return asked_for ? at::zeros_like(*weight) : at::Tensor();
  };
  return {wanted.x ? at::zeros(x.sizes(), x.options()) : at::Tensor(),
          zeros(weights.pe, wanted.pe),
          zeros(weights.w1, wanted.w1),
          zeros(weights.b1, wanted.b1),
          zeros(weights.w2, wanted.w2),
          zeros(weights.b2, wanted.b2)};
}

namespace {

// (N, H, K) by weights (O, K) shared by the heads, or (H, O, K): -> (N, H, O).
at::Tensor apply_heads(const at::Tensor& x, const at::Tensor& weight) {
  if (weight.dim() == 2) {
    return at::matmul(x, weight.t());
  }
  return at::bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1);
}

// The gradient of the weight: (O, K) or (H, O, K).
at::Tensor weight_gradient(const at::Tensor& grad, const at::Tensor& x, bool per_head) {
  if (per_head) {
    return at::bmm(grad.permute({1, 2, 0}), x.transpose(0, 1));
  }
  return at::mm(grad.reshape({-1, grad.size(2)}).t(), x.reshape({-1, x.size(2)}));
}

// W1 vec(PE) + b1: (O) or (H, O), undefined when there is neither.
at::Tensor first_bias(const PhiWeights& weights) {
  at::Tensor bias;
  if (weights.pe.has_value()) {
    const at::Tensor pe = weights.pe->flatten(-2, -1);
    bias = at::matmul(*weights.w1, pe.unsqueeze(-1)).squeeze(-1);
  }
  if (weights.b1.has_value()) {
    bias = bias.defined() ? bias + *weights.b1 : *weights.b1;
  }
  return bias;
}

at::Tensor first_layer(const at::Tensor& chunks, const PhiWeights& weights, const CompressionBlocks& blocks) {
  const at::Tensor parts = apply_heads(chunks, split_weight(*weights.w1, blocks.pieces()));
  const at::Tensor hidden = blocks.shift_and_add(parts.unflatten(-1, {blocks.pieces(), -1}));
  const at::Tensor bias = first_bias(weights);
  return bias.defined() ? hidden + bias : hidden;
}

at::Tensor mean_forward(const at::Tensor& chunks, const CompressionBlocks& blocks, int64_t block_size) {
  const at::Tensor sums = chunks.unflatten(-1, {blocks.stride(), -1}).sum(2).unsqueeze(2);
  return blocks.shift_and_add(sums.expand({-1, -1, blocks.pieces(), -1})) / static_cast<double>(block_size);
}

at::Tensor mean_backward(const at::Tensor& grad, const CompressionBlocks& blocks, int64_t block_size) {
  const at::Tensor sums = blocks.shift_and_spread(grad).sum(2) / static_cast<double>(block_size);
  return sums.unsqueeze(2).expand({-1, -1, blocks.stride(), -1}).flatten(2, 3);
}

// The gradients of x, pe, w1 and b1, given the gradient of the first layer's result.
void first_layer_backward(const at::Tensor& grad_hidden, const at::Tensor& chunks, const at::Tensor& x,
                          const PhiWeights& weights, const CompressionBlocks& blocks, const PhiMask& wanted,
                          PhiGradients& grads) {
  const at::Tensor& w1 = *weights.w1;
  const at::Tensor grad_parts = blocks.shift_and_spread(grad_hidden).flatten(2, 3);
  if (wanted.x) {
    const at::Tensor parts = split_weight(w1, blocks.pieces());
    grads.x = blocks.scatter_chunks(apply_heads(grad_parts, parts.transpose(-1, -2)).contiguous(), x);
  }
  if (wanted.w1) {
    grads.w1 = join_weight(weight_gradient(grad_parts, chunks, w1.dim() == 3), blocks.pieces());
  }
  const at::Tensor grad_bias = grad_hidden.sum(0);  // (H, O)
  if (wanted.b1) {
    grads.b1 = sum_to(grad_bias, *weights.b1, 1);
  }
  if (wanted.pe) {
    grads.pe = sum_to(at::matmul(grad_bias.unsqueeze(1), w1).squeeze(1), *weights.pe, 2);
  }
  if (wanted.w1 && weights.pe.has_value()) {
    const at::Tensor pe = weights.pe->flatten(-2, -1);                                          // (l D) or (H, l D)
    const at::Tensor outer = grad_bias.unsqueeze(-1) * (pe.dim() == 1 ? pe : pe.unsqueeze(1));  // (H, O, l D)
    grads.w1 = grads.w1 + sum_to(outer, w1, 2);
  }
}

}  // namespace

at::Tensor phi_forward(const at::Tensor& x, const PhiWeights& weights, int64_t block_size, int64_t block_stride,
                       const Packing& packing) {
  const CompressionBlocks blocks(x, block_size, block_stride, packing);
  const at::Tensor chunks = blocks.gather_chunks(x);
  at::Tensor out;
  if (!weights.w1.has_value()) {
    out = mean_forward(chunks, blocks, block_size);
  } else if (!weights.w2.has_value()) {
    out = first_layer(chunks, weights, blocks);
  } else {
    out = apply_heads(at::gelu(first_layer(chunks, weights, blocks)), *weights.w2);
    out = weights.b2.has_value() ? out + *weights.b2 : out;
  }
  return blocks.to_output(blocks.mask(out).contiguous());
}

PhiGradients phi_backward(const at::Tensor& grad_out, const at::Tensor& x, const PhiWeights& weights,
                          int64_t block_size, int64_t block_stride, const Packing& packing, const PhiMask& wanted) {
  const CompressionBlocks blocks(x, block_size, block_stride, packing);
  PhiGradients grads = zero_gradients(x, weights, wanted);
  if (blocks.empty()) {
    return grads;
  }
  const at::Tensor grad = blocks.from_output(grad_out);
  if (!weights.w1.has_value()) {
    if (wanted.x) {
      grads.x = blocks.scatter_chunks(mean_backward(grad, blocks, block_size), x);
    }
    return grads;
  }
  if (wanted.b2) {
    grads.b2 = sum_to(grad.sum(0), *weights.b2, 1);
  }
  if (!wanted.w2 && !wanted.first()) {
    return grads;
  }
  const at::Tensor chunks = blocks.gather_chunks(x);
  at::Tensor grad_hidden = grad;
  if (weights.w2.has_value()) {
    const at::Tensor hidden = first_layer(chunks, weights, blocks);
    if (wanted.w2) {
      grads.w2 = weight_gradient(grad, at::gelu(hidden), weights.w2->dim() == 3);
    }
    if (!wanted.first()) {
      return grads;
    }
    grad_hidden = at::gelu_backward(apply_heads(grad, weights.w2->transpose(-1, -2)), hidden);
  }
  first_layer_backward(grad_hidden, chunks, x, weights, blocks, wanted, grads);
  return grads;
}

}  // namespace nsa
