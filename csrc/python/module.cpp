// nsa_torch._C: what the kernels were built with, and which of them a call runs. It knows no torch, so that one serves
// every version; the ops themselves need no Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/build_info.h"
#include "plans/which_kernel.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const nsa::BuildInfo info = nsa::build_info();
  py::dict result;
  result["cuda"] = info.cuda.empty() ? py::object(py::none()) : py::object(py::str(info.cuda));
  result["compiler"] = info.compiler;
  result["openmp"] = info.openmp;
  result["architectures"] = info.architectures;
  result["kernels"] = info.kernels;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of nsa_torch, and which kernels a call runs.";
  m.def("build_info", &build_info,
        "What the kernels were built with: cuda (None without), compiler, openmp, architectures, kernels.");
  m.def(
      "missing_kernels",
      [](const std::vector<std::string>& architectures, std::pair<int, int> capability) {
        return nsa::missing_kernels(architectures, capability.first, capability.second);
      },
      py::arg("architectures"), py::arg("capability"),
      "What a GPU of this compute capability is told of a build for these architectures; empty if it lacks nothing.");
  m.def("ops_with_kernels", &nsa::ops_with_kernels, "The ops that which_kernel knows.");

  py::class_<nsa::KernelQuery>(m, "KernelQuery")
      .def(py::init<>())
      .def_readwrite("op", &nsa::KernelQuery::op)
      .def_readwrite("device", &nsa::KernelQuery::device)
      .def_readwrite("dtype", &nsa::KernelQuery::dtype)
      .def_readwrite("backward", &nsa::KernelQuery::backward)
      .def_readwrite("capability", &nsa::KernelQuery::capability)
      .def_readwrite("batch", &nsa::KernelQuery::batch)
      .def_readwrite("num_heads", &nsa::KernelQuery::num_heads)
      .def_readwrite("num_kv_heads", &nsa::KernelQuery::num_kv_heads)
      .def_readwrite("head_dim", &nsa::KernelQuery::head_dim)
      .def_readwrite("v_head_dim", &nsa::KernelQuery::v_head_dim)
      .def_readwrite("num_queries", &nsa::KernelQuery::num_queries)
      .def_readwrite("num_keys", &nsa::KernelQuery::num_keys)
      .def_readwrite("block_size", &nsa::KernelQuery::block_size)
      .def_readwrite("block_stride", &nsa::KernelQuery::block_stride)
      .def_readwrite("select_size", &nsa::KernelQuery::select_size)
      .def_readwrite("num_selected", &nsa::KernelQuery::num_selected)
      .def_readwrite("window", &nsa::KernelQuery::window);
  py::class_<nsa::KernelReport>(m, "KernelReport")
      .def_readonly("kernels", &nsa::KernelReport::kernels)
      .def_readonly("reason", &nsa::KernelReport::reason)
      .def_readonly("splits", &nsa::KernelReport::splits)
      .def_readonly("workspace_bytes", &nsa::KernelReport::workspace_bytes);
  m.def("which_kernel", &nsa::which_kernel, py::arg("query"),
        "The kernels of a call. ValueError names the field that is wrong and what is allowed.");
}
