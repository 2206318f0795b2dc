// A build without CUDA computes CUDA tensors on the CPU: right, differentiable, and slow, which a warning says once.
// The composition in nsa/ runs where its parts do.
#if !defined(NSA_CUDA_VERSION)

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUFallback.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace nsa {
namespace {

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto given = torch::jit::last(*stack, arguments.size());
  const c10::IValue* first = nullptr;
  size_t first_at = 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!given[i].isTensor()) {
      continue;
    }
    if (first == nullptr) {
      first = &given[i];
      first_at = i;
    }
    const auto device = given[i].toTensor().device();
    TORCH_CHECK_TYPE(device == first->toTensor().device(), arguments[i].name(), " must be on the device of ",
                     arguments[first_at].name(), ", ", first->toTensor().device(), ", got ", device);
  }
  TORCH_WARN_ONCE("nsa_torch: ", op.schema().name(), " runs on the CPU: this build has no CUDA kernels");
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(nsa, CUDA, m) {
  for (const char* op : {"compress", "compress_backward", "compressed_attention", "compressed_attention_backward",
                         "select_blocks", "selected_attention", "selected_attention_backward", "window_attention",
                         "window_attention_backward", "nsa_attention_with_kvcache"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}

}  // namespace nsa

#endif
