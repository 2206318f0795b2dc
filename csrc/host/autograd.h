// Saving what a backward needs: optional tensors, optional SymInts, and the packing of a call.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "host/packing.h"

namespace nsa {

// The op with this signature, looked up by name: calls go through the dispatcher.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Calls an op whose last arguments are those of a packing.
template <typename Op, typename... Args>
auto call_packed(const Op& op, const Packing& p, Args&&... args) {
  return op.call(std::forward<Args>(args)..., p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k,
                 p.seqused_k);
}

// Saved in order; an absent one is saved as an undefined tensor.
inline void save_tensors(torch::autograd::AutogradContext* ctx, const std::vector<std::optional<at::Tensor>>& tensors) {
  torch::autograd::variable_list saved;
  for (const auto& tensor : tensors) {
    saved.push_back(tensor.value_or(at::Tensor()));
  }
  ctx->save_for_backward(saved);
}

inline std::vector<std::optional<at::Tensor>> load_tensors(torch::autograd::AutogradContext* ctx) {
  std::vector<std::optional<at::Tensor>> tensors;
  for (const at::Tensor& tensor : ctx->get_saved_variables()) {
    tensors.push_back(tensor.defined() ? std::optional(tensor) : std::nullopt);
  }
  return tensors;
}

// Which gradients are asked for, of inputs that are tensors and come first.
template <size_t inputs>
std::array<bool, inputs> needed_gradients(const torch::autograd::AutogradContext* ctx) {
  std::array<bool, inputs> needed{};
  for (size_t i = 0; i < inputs; ++i) {
    needed[i] = ctx->needs_input_grad(i);
  }
  return needed;
}

// What an op returned, or nothing where it was not asked for.
inline at::Tensor if_needed(const at::Tensor& gradient, bool needed) { return needed ? gradient : at::Tensor(); }

inline std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

inline std::optional<c10::SymInt> load_optional_int(torch::autograd::AutogradContext* ctx, const char* name) {
  const c10::IValue& value = ctx->saved_data[name];
  return value.isNone() ? std::nullopt : std::optional(value.toSymInt());
}

}  // namespace nsa
