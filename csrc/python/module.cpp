// nsa_torch._C: what the kernels were built with, and which of them a call runs. It knows no torch, so that one serves
// every version; the ops themselves need no Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/build_info.h"
#include "plans/instances.h"
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

void bind_plans(py::module_& m) {
  py::class_<nsa::KernelTile>(m, "KernelTile")
      .def_readonly("rows", &nsa::KernelTile::rows)
      .def_readonly("keys", &nsa::KernelTile::keys)
      .def_readonly("stages", &nsa::KernelTile::stages)
      .def_readonly("static_bytes", &nsa::KernelTile::static_bytes)
      .def_readonly("dynamic_bytes", &nsa::KernelTile::dynamic_bytes);
  py::class_<nsa::ReportedLaunch>(m, "ReportedLaunch")
      .def_readonly("kernel", &nsa::ReportedLaunch::kernel)
      .def_readonly("tile", &nsa::ReportedLaunch::tile)
      .def_readonly("count", &nsa::ReportedLaunch::count);
  py::class_<nsa::KernelReport>(m, "KernelReport")
      .def_readonly("launches", &nsa::KernelReport::launches)
      .def_readonly("reason", &nsa::KernelReport::reason)
      .def_readonly("splits", &nsa::KernelReport::splits)
      .def_readonly("workspace_bytes", &nsa::KernelReport::workspace_bytes);
  m.def("which_kernel", &nsa::which_kernel, py::arg("query"),
        "The kernels of a call. ValueError names the field that is wrong and what is allowed.");
  py::class_<nsa::KernelInstance>(m, "KernelInstance")
      .def_readonly("kernel", &nsa::KernelInstance::kernel)
      .def_readonly("element", &nsa::KernelInstance::element)
      .def_readonly("dim_k", &nsa::KernelInstance::dim_k)
      .def_readonly("dim_v", &nsa::KernelInstance::dim_v)
      .def_readonly("variant", &nsa::KernelInstance::variant)
      .def_readonly("tile", &nsa::KernelInstance::tile);
  m.def("kernel_instances", &nsa::kernel_instances, "Every CUDA kernel that there is, and its shared memory.");
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
  m.def(
      "no_kernels",
      [](const std::vector<std::string>& architectures, std::pair<int, int> capability) {
        return nsa::no_kernels(architectures, capability.first, capability.second);
      },
      py::arg("architectures"), py::arg("capability"),
      "What it is told if nothing of such a build runs there; empty if something does.");
  m.def("ops_with_kernels", &nsa::ops_with_kernels, "The ops that which_kernel knows.");

  py::class_<nsa::KernelQuery>(m, "KernelQuery")
      .def(py::init<>())
      .def_readwrite("op", &nsa::KernelQuery::op)
      .def_readwrite("device", &nsa::KernelQuery::device)
      .def_readwrite("dtype", &nsa::KernelQuery::dtype)
      .def_readwrite("backward", &nsa::KernelQuery::backward)
      .def_readwrite("gradients", &nsa::KernelQuery::gradients)
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
      .def_readwrite("window", &nsa::KernelQuery::window)
      .def_readwrite("compression", &nsa::KernelQuery::compression)
      .def_readwrite("hidden_size", &nsa::KernelQuery::hidden_size)
      .def_readwrite("per_head", &nsa::KernelQuery::per_head);
  bind_plans(m);
}
