// phi by the same algebra as phi.cpp. What is summed further (the l/d parts of the first layer, products that get a
// bias, gradients of weights) leaves cuBLAS in float32, so that every result is rounded once.
#include "compression/cuda/phi.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/cuda/CUDAGuard.h>

#include "compression/cuda/call.h"
#include "compression/cuda/launch.h"

namespace nsa::cuda {
namespace {

// a b, of matrices or of batches of them; float32, or of their dtype.
at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, bool wide) {
  const bool batched = a.dim() == 3;
  if (!wide || a.scalar_type() == at::kFloat) {
    return batched ? at::bmm(a, b) : at::mm(a, b);
  }
  if (a.numel() == 0 || b.numel() == 0) {
    return multiply(a, b, false).to(at::kFloat);
  }
  return batched ? at::bmm(a, b, at::kFloat) : at::mm(a, b, at::kFloat);
}

// (N, H, K) by weights (K, O) that heads share, or (H, K, O): (N, H, O), of unit columns.
at::Tensor multiply_heads(Product product, const at::Tensor& x, const at::Tensor& weight, bool wide) {
  if (product == Product::kShared) {
    return multiply(x.reshape({x.size(0) * x.size(1), x.size(2)}), weight, wide)
        .view({x.size(0), x.size(1), weight.size(1)});
  }
  return multiply(x.transpose(0, 1), weight, wide).transpose(0, 1);
}

// The gradient of a weight (O, K) or (H, O, K), float32, from (N, H, O) and (N, H, K).
at::Tensor weight_gradient(Product product, const at::Tensor& grad, const at::Tensor& x) {
  if (product == Product::kPerHead) {
    return multiply(grad.permute({1, 2, 0}), x.transpose(0, 1), /*wide=*/true);
  }
  const int64_t rows = x.size(0) * x.size(1);
  return multiply(grad.reshape({rows, grad.size(2)}).t(), x.reshape({rows, x.size(2)}), /*wide=*/true);
}

// W1 vec(PE) + b1.
at::Tensor first_bias(const CompressCall& call, const PhiWeights& weights) {
  at::Tensor bias;
  if (weights.pe.has_value()) {
    const at::Tensor& w1 = *weights.w1;
    const at::Tensor pe = weights.pe->reshape({-1, w1.size(-1)});  // (1, l D) or (H, l D)
    if (call.plan.first == Product::kShared) {
      bias = multiply(pe, w1.t(), /*wide=*/true);
    } else {
      bias = multiply(pe.expand({call.heads, -1}).unsqueeze(1), w1.transpose(1, 2), /*wide=*/true).squeeze(1);
    }
  }
  if (weights.b1.has_value()) {
    bias = bias.defined() ? bias + *weights.b1 : weights.b1->to(at::kFloat);
  }
  return bias.defined() ? bias.contiguous() : bias;
}

struct FirstLayer {
  at::Tensor chunks;  // (chunks, H, d D)
  at::Tensor weight;  // (l/d O, d D), or one per head
  at::Tensor bias;    // float32
  at::Tensor parts;   // (chunks, H, l/d O) float32
};

at::Tensor gather_chunks(const CompressCall& call, const at::Tensor& x) {
  const BlockLayout& layout = call.layout;
  const at::Tensor chunks = at::empty({layout.num_chunks, call.heads, layout.block_stride * x.size(-1)}, x.options());
  launch_gather_chunks(layout, view_of(x), call.heads, chunk_rows_of(chunks), call.type, call.stream);
  return chunks;
}

at::Tensor multiply_parts(const CompressCall& call, const FirstLayer& first) {
  return multiply_heads(call.plan.first, first.chunks, first.weight.transpose(-1, -2), /*wide=*/true);
}

// out = act(parts, shifted and added, + bias)
void shift_and_add(const CompressCall& call, const FirstLayer& first, Activation activation, const at::Tensor& out) {
  const ShiftAddParams params{
      .layout = call.layout,
      .items = {.heads = call.heads, .width = static_cast<int32_t>(first.weight.size(-2) / call.layout.pieces)},
      .pieces = call.layout.pieces,
      .from_blocks = false,
      .parts = chunk_rows_of(first.parts),
      .bias = bias_of(first.bias),
      .out = chunk_rows_of(out)};
  launch_shift_and_add(params, activation, call.type, call.stream);
}

// The parameters of a copy of (blocks, H, O) that adds a bias, rounds, and clears rows without a block.
ShiftAddParams copy_blocks(const CompressCall& call, const at::Tensor& from, const at::Tensor& bias,
                           const at::Tensor& to) {
  return {.layout = call.layout,
          .items = {.heads = call.heads, .width = static_cast<int32_t>(from.size(2))},
          .pieces = 1,
          .from_blocks = true,
          .parts = chunk_rows_of(from),
          .bias = bias_of(bias),
          .out = chunk_rows_of(to)};
}

at::Tensor hidden_layer(const CompressCall& call, const FirstLayer& first) {
  const int64_t width = first.weight.size(-2) / call.layout.pieces;
  at::Tensor hidden = at::empty({call.layout.num_blocks, call.heads, width}, first.chunks.options());
  shift_and_add(call, first, Activation::kGelu, hidden);
  return hidden;
}

// (B, M, H, O) or packed (M, H, O), as (blocks, H, O).
at::Tensor as_rows(const CompressCall& call, const at::Tensor& output) {
  return unit_stride(output.reshape({call.layout.num_blocks, call.heads, output.size(-1)}));
}

// pe and b1 act through the bias, whose gradient is (H, O).
void bias_gradients(const at::Tensor& grad_bias, const PhiWeights& weights, const PhiMask& wanted,
                    PhiGradients& grads) {
  const at::Tensor& w1 = *weights.w1;
  if (wanted.b1) {
    grads.b1 = sum_to(grad_bias, *weights.b1, 1);
  }
  if (wanted.pe) {
    // In float32, as sums over all blocks: float16 might not hold them.
    grads.pe = sum_to(at::matmul(grad_bias.unsqueeze(1), w1.to(at::kFloat)).squeeze(1), *weights.pe, 2);
  }
  if (wanted.w1 && weights.pe.has_value()) {
    const at::Tensor pe = weights.pe->reshape({-1, w1.size(-1)}).to(at::kFloat);
    if (w1.dim() == 2) {
      grads.w1.addmm_(grad_bias.t(), pe.expand({grad_bias.size(0), -1}));
    } else {
      grads.w1.addcmul_(grad_bias.unsqueeze(2), pe.unsqueeze(1));
    }
  }
}

// The gradients of x, pe, w1 and b1; `grad` is that of what follows the first layer's activation.
void first_layer_backward(const CompressCall& call, const FirstLayer& first, const at::Tensor& grad,
                          Activation activation, const PhiWeights& weights, const PhiMask& wanted,
                          PhiGradients& grads) {
  const BlockLayout& layout = call.layout;
  const int64_t width = first.weight.size(-2) / layout.pieces;
  const at::Tensor grad_parts =
      at::empty({layout.num_chunks, call.heads, layout.pieces * width}, first.weight.options());
  const bool activated = activation != Activation::kNone;
  const SpreadParams params{.layout = layout,
                            .items = {.heads = call.heads, .width = static_cast<int32_t>(width)},
                            .grad = chunk_rows_of(grad),
                            .parts = activated ? chunk_rows_of(first.parts) : ChunkRows{},
                            .bias = bias_of(first.bias),
                            .grad_parts = chunk_rows_of(grad_parts)};
  launch_shift_and_spread(params, activation, call.type, call.stream);
  if (wanted.x) {
    const at::Tensor grad_chunks = multiply_heads(call.plan.first, grad_parts, first.weight, /*wide=*/false);
    launch_scatter_chunks(layout, chunk_rows_of(grad_chunks), call.heads, view_of(grads.x), call.type, call.stream);
  }
  if (wanted.w1) {
    grads.w1 = join_weight(weight_gradient(call.plan.first, grad_parts, first.chunks), layout.pieces);
  }
  if (wanted.b1 || wanted.pe || (wanted.w1 && weights.pe.has_value())) {
    // The first piece of a chunk is the gradient of the block that starts there.
    bias_gradients(at::sum(grad_parts.narrow(2, 0, width), {0}, /*keepdim=*/false, at::kFloat), weights, wanted, grads);
  }
}

}  // namespace

void phi_forward(const at::Tensor& x, const PhiWeights& weights, int64_t block_size, int64_t block_stride,
                 const Packing& packing, const at::Tensor& out) {
  element_type("x", x);  // refuses others, whatever the shape
  const c10::cuda::CUDAGuard guard(x.device());
  if (!has_blocks(x, block_size) || out.numel() == 0) {
    out.zero_();
    return;
  }
  const CompressCall call = lay_out(x, weights, block_size, block_stride, packing, std::nullopt);
  const at::Tensor x_read = unit_stride(x);
  const at::Tensor rows = out.view({call.layout.num_blocks, call.heads, out.size(-1)});
  if (call.plan.phi == Phi::kMean) {
    launch_mean_forward(call.layout, view_of(x_read), call.heads, chunk_rows_of(rows), call.type, call.stream);
    return;
  }
  FirstLayer first{.chunks = gather_chunks(call, x_read),
                   .weight = split_weight(*weights.w1, call.layout.pieces),
                   .bias = first_bias(call, weights),
                   .parts = {}};
  first.parts = multiply_parts(call, first);
  if (call.plan.phi == Phi::kLinear) {
    shift_and_add(call, first, Activation::kNone, rows);
    return;
  }
  const at::Tensor hidden = hidden_layer(call, first);
  const at::Tensor product = multiply_heads(call.plan.second, hidden, weights.w2->transpose(-1, -2), /*wide=*/true);
  const at::Tensor bias = weights.b2.has_value() ? weights.b2->to(at::kFloat).contiguous() : at::Tensor();
  launch_shift_and_add(copy_blocks(call, product, bias, rows), Activation::kNone, call.type, call.stream);
}

PhiGradients phi_backward(const at::Tensor& grad_out, const at::Tensor& x, const PhiWeights& weights,
                          int64_t block_size, int64_t block_stride, const Packing& packing, const PhiMask& wanted) {
  element_type("x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  if (!has_blocks(x, block_size)) {
    return zero_gradients(x, weights, wanted);
  }
  const CompressCall call = lay_out(x, weights, block_size, block_stride, packing, wanted);
  PhiGradients grads;
  grads.x = wanted.x ? at::empty(x.sizes(), x.options()) : at::Tensor();
  const at::Tensor grad = as_rows(call, grad_out);
  if (call.plan.phi == Phi::kMean) {
    if (wanted.x) {
      launch_mean_backward(call.layout, chunk_rows_of(grad), call.heads, view_of(grads.x), call.type, call.stream);
    }
    return grads;
  }
  FirstLayer first{.chunks = call.plan.gathers ? gather_chunks(call, unit_stride(x)) : at::Tensor(),
                   .weight = split_weight(*weights.w1, call.layout.pieces),
                   .bias = {},
                   .parts = {}};
  if (call.plan.phi == Phi::kLinear) {
    if (wanted.first()) {
      first_layer_backward(call, first, grad, Activation::kNone, weights, wanted, grads);
    }
    return grads;
  }
  at::Tensor blocks = grad;
  if (packing.packed()) {  // what came for rows without a block counts nowhere
    blocks = at::empty(grad.sizes(), grad.options());
    launch_mask_blocks(copy_blocks(call, grad, {}, blocks), call.type, call.stream);
  }
  if (wanted.b2) {
    grads.b2 = sum_to(at::sum(blocks, {0}, /*keepdim=*/false, at::kFloat), *weights.b2, 1);
  }
  if (call.plan.gathers) {  // the first layer once more
    first.bias = first_bias(call, weights);
    first.parts = multiply_parts(call, first);
  }
  if (wanted.w2) {
    grads.w2 = weight_gradient(call.plan.second, blocks, hidden_layer(call, first));
  }
  if (wanted.first()) {
    first_layer_backward(call, first, multiply_heads(call.plan.second, blocks, *weights.w2, /*wide=*/true),
                         Activation::kGelu, weights, wanted, grads);
  }
  return grads;
}

}  // namespace nsa::cuda
