// nsa_torch._C: what the library was built with, and which kernel runs for given shapes. The ops themselves need no
// Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/build_info.h"
#include "host/kernel_choice.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const nsa::BuildInfo info = nsa::build_info();
  py::dict result;
  result["torch"] = info.torch;
  result["cuda"] = info.cuda.empty() ? py::object(py::none()) : py::object(py::str(info.cuda));
  result["compiler"] = info.compiler;
  result["openmp"] = info.openmp;
  result["architectures"] = info.architectures;
  result["kernels"] = info.kernels;
  return result;
}

py::tuple choose_kernel(std::string op, std::string device, std::string dtype, int64_t num_heads, int64_t num_kv_heads,
                        int64_t num_keys, int64_t select_size, int64_t num_selected) {
  const nsa::KernelChoice choice = nsa::choose_kernel({std::move(op), std::move(device), std::move(dtype), num_heads,
                                                       num_kv_heads, num_keys, select_size, num_selected});
  return py::make_tuple(choice.kernel, choice.reason);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of nsa_torch, and which kernel runs for given shapes.";
  m.def("build_info", &build_info,
        "What libnsa_torch.so was built with: torch, cuda (None without), compiler, openmp, architectures, kernels.");
  m.def(
      "missing_kernels",
      [](const std::vector<std::string>& architectures, std::pair<int, int> capability) {
        return nsa::missing_kernels(architectures, capability.first, capability.second);
      },
      py::arg("architectures"), py::arg("capability"),
      "What a GPU of this compute capability is told of a build for these architectures; empty if it lacks nothing.");
  m.def("ops_with_kernels", &nsa::ops_with_kernels, "The ops that choose_kernel knows.");
  m.def("choose_kernel", &choose_kernel, py::arg("op"), py::kw_only(), py::arg("device") = "cpu",
        py::arg("dtype") = "float32", py::arg("num_heads") = 1, py::arg("num_kv_heads") = 1, py::arg("num_keys") = 1,
        py::arg("select_size") = 64, py::arg("num_selected") = 16,
        "(kernel, reason) for an op. ValueError names the field that is wrong and what is allowed.");
}
