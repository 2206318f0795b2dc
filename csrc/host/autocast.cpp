// Under autocast every floating argument is cast to the autocast dtype, except gates and lse, which stay as they are.
// The backwards run in the dtypes that their forwards saved. Both keep autocast out of the ops that they are made of.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

namespace nsa {
namespace {

template <c10::DeviceType device>
void run_without_autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  op.callBoxed(stack);
}

template <c10::DeviceType device>
void autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const auto& arguments = op.schema().arguments();
  const auto given = torch::jit::last(*stack, arguments.size());
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i].name();
    if (given[i].isTensor() && name != "gates" && name != "lse") {
      (*stack)[first + i] = at::autocast::cached_cast(type, (*stack)[first + i].toTensor(), device);
    }
  }
  run_without_autocast<device>(op, stack);
}

template <c10::DeviceType device>
void register_autocast(torch::Library& m) {
  for (const char* op : {"compress", "compressed_attention", "select_blocks", "selected_attention", "window_attention",
                         "nsa_attention", "nsa_attention_with_kvcache"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&autocast<device>>());
  }
  for (const char* op : {"compress_backward", "compressed_attention_backward", "selected_attention_backward",
                         "window_attention_backward", "nsa_attention_backward"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&run_without_autocast<device>>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, AutocastCPU, m) { register_autocast<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(nsa, AutocastCUDA, m) { register_autocast<c10::DeviceType::CUDA>(m); }

}  // namespace nsa
