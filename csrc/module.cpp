// The Python module vadiff._native. Its kernels take the address of a Call (call.h), which vadiff/ops/native.py has filled.

#include <pybind11/pybind11.h>

#include "kernels.h"

#define VADIFF_STRING_(x) #x
#define VADIFF_STRING(x) VADIFF_STRING_(x)

namespace py = pybind11;

namespace vadiff {
namespace {

constexpr int kInterface = 12;  // INTERFACE of vadiff/ops/native.py: one more there and here when what Python calls changes

using Kernel = void (*)(const Call&);

const Call& call_at(uintptr_t address) { return *reinterpret_cast<const Call*>(address); }

void define(py::module_& m, const char* name, Kernel on_cpu, Kernel on_cuda) {
  auto run = [=](uintptr_t address) {
    const Call& call = call_at(address);
    if (call.device < 0) return on_cpu(call);
    if (!on_cuda) throw std::runtime_error("vadiff's native kernels were built without CUDA");
    on_cuda(call);
  };
  m.def(name, run, py::call_guard<py::gil_scoped_release>());
}

py::tuple cpu_instruction_sets() {
  py::list names;
  for (int i = 0; const RowKernels* kernels = cpu::available(i); ++i) names.append(kernels->name);
  return py::tuple(names);
}

void cpu_select(const std::string& name) {
  if (!cpu::select(name.c_str())) throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

}  // namespace
}  // namespace vadiff

PYBIND11_MODULE(_native, m) {
  using namespace vadiff;
  m.doc() = "Compiled kernels of vadiff on raw addresses; see vadiff.ops.native.";
  m.attr("INTERFACE") = kInterface;
  m.attr("CALL_SIZE") = sizeof(Call);
  m.def("cpu_instruction_sets", &cpu_instruction_sets, "What is compiled in and runs here, the best first.");
  m.def("cpu_select", &cpu_select, "Use this instruction set from now on, in place of the best; for tests.");
#ifdef VADIFF_CUDA
#define VADIFF_DEFINE(name) define(m, #name, &cpu::name, &cuda::name)
  m.def("cuda_workspace_size", [](uintptr_t address) { return cuda::workspace_size(call_at(address)); });
  m.attr("cuda_architectures") = VADIFF_STRING(VADIFF_CUDA);
#else
#define VADIFF_DEFINE(name) define(m, #name, &cpu::name, nullptr)
  m.attr("cuda_architectures") = py::none();
#endif
  VADIFF_DEFINE(step);
  VADIFF_DEFINE(backward);
  VADIFF_DEFINE(scale);
  VADIFF_DEFINE(reweight);
  VADIFF_DEFINE(fold);
}
