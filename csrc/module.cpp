// The Python module vadiff._native. Addresses and numbers in; who calls has checked them (vadiff/native.py, vadiff/ops.py). An
// address of 0 stands for "not given".

#include <pybind11/pybind11.h>

#include "cpu.h"
#include "direct.h"
#include "settings.h"
#ifdef VADIFF_CUDA
#include "cuda.h"
#endif

#define VADIFF_STRING_(x) #x
#define VADIFF_STRING(x) VADIFF_STRING_(x)

namespace py = pybind11;

namespace vadiff {
namespace {

constexpr int kInterface = 6;  // INTERFACE of vadiff/native.py: one more there and here when what Python calls changes

// The residual's tensors and coefficients, as the calls below give them.
struct Inputs {
  Elements output, target, noise;
  Address a_each, b_each, c_each;
  double a, b, c, huber_delta;
  int64_t elements;

  template <class C>
  RowsTask<C> rows(Address gradient) const {
    RowsTask<C> task{};
    task.output = output, task.target = target, task.noise = noise;
    task.a_each = at<C>(a_each), task.b_each = at<C>(b_each), task.c_each = at<C>(c_each);
    task.a = C(a), task.b = C(b), task.c = C(c), task.huber_delta = C(huber_delta);
    task.elements = elements;
    task.gradient = at<void>(gradient);
    return task;
  }
};

Inputs inputs(Address output, int output_dtype, Address target, int target_dtype, Address noise, int noise_dtype,
              Address a_each, Address b_each, Address c_each, double a, double b, double c, double huber_delta,
              int64_t elements) {
  return {{at<void>(output), output_dtype},
          {at<void>(target), target_dtype},
          {at<void>(noise), noise_dtype},
          a_each, b_each, c_each, a, b, c, huber_delta, elements};
}

template <class Run>
void in_arithmetic_of(int dtype, Run run) {
  dtype == kFloat64 ? run(0.0) : run(0.0f);
}

// `where`: a number of threads, or a place on a CUDA device.

template <class Place>
void run_diffusion_loss(const Inputs& in, Address log_snr, Address base_weight, Address sample_weight, Address weight,
                        Address state, Address log_weights, const Settings& settings, int64_t samples, Address loss, bool mean,
                        Address ell, Address saved, Address gradient, bool move, Address batch, const Place& where) {
  in_arithmetic_of(in.output.dtype, [&](auto zero) {
    using C = decltype(zero);
    diffusion_loss<C>(in.rows<C>(gradient), samples,
                      settings.levels<C>(log_snr, base_weight, sample_weight, weight, log_weights),
                      Results<C>{at<C>(ell), at<C>(loss), at<C>(saved), mean},
                      settings.update(move, state, log_weights, batch), where);
  });
}

template <class Place>
void run_diffusion_loss_backward(const Inputs& in, Address upstream, int64_t stride, bool mean, Address saved, int64_t samples,
                                 Address gradient, const Place& where) {
  in_arithmetic_of(in.output.dtype, [&](auto zero) {
    using C = decltype(zero);
    diffusion_loss_backward<C>(in.rows<C>(gradient), samples, at<C>(upstream), stride, mean, at<C>(saved), where);
  });
}

template <class Place>
void run_scale_gradient(Address gradient, Address out, int dtype, int64_t size, Address upstream, Address mean_loss,
                        const Place& where) {
  in_arithmetic_of(dtype, [&](auto zero) {
    using C = decltype(zero);
    scale_gradient<C>(at<void>(gradient), at<void>(out), dtype, size, at<C>(upstream), at<C>(mean_loss), where);
  });
}

template <class Place>
void run_reweight(Address loss, int dtype, Address log_snr, Address sample_weight, Address weight, Address state,
                  Address log_weights, const Settings& settings, int64_t samples, Address saved, bool move, Address batch,
                  const Place& where) {
  in_arithmetic_of(dtype, [&](auto zero) {
    using C = decltype(zero);
    reweight<C>(at<C>(loss), samples, settings.levels<C>(log_snr, 0, sample_weight, weight, log_weights),
                Results<C>{nullptr, nullptr, at<C>(saved), true}, settings.update(move, state, log_weights, batch), where);
  });
}

template <class Place>
void run_fold(Address parts, int64_t count, Address state, Address log_weights, const Settings& settings, const Place& where) {
  fold(at<double>(parts), count, settings.update(true, state, log_weights, 0), where);
}

// The same names for every kind of place: pybind11 chooses by the last argument.
template <class Place>
void define_kernels(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("diffusion_loss", &run_diffusion_loss<Place>, release());
  m.def("diffusion_loss_backward", &run_diffusion_loss_backward<Place>, release());
  m.def("scale_gradient", &run_scale_gradient<Place>, release());
  m.def("reweight", &run_reweight<Place>, release());
  m.def("fold", &run_fold<Place>, release());
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
  m.doc() = "Compiled kernels of vadiff on raw addresses; see vadiff.native.";
  m.attr("INTERFACE") = kInterface;
  py::class_<Settings>(m, "Settings", py::module_local())
      .def(py::init<int, double, double, double, const std::string&, double, double, double, double, int>());
  py::class_<Inputs>(m, "Inputs", py::module_local()).def(py::init(&inputs));
  define_kernels<int>(m);
  define_direct_step(m);
  m.def("cpu_instruction_sets", &cpu_instruction_sets, "What is compiled in and runs here, the best first.");
  m.def("cpu_select", &cpu_select, "Use this instruction set from now on; for tests and benchmarks.");
  m.def("cpu_selected", [] { return cpu::selected(); });
#ifdef VADIFF_CUDA
  py::class_<Where>(m, "Where", py::module_local()).def(py::init([](int device, Address stream, Address workspace) {
    return Where{device, at<void>(stream), at<double>(workspace)};
  }));
  define_kernels<Where>(m);
  m.def("cuda_workspace_size", &cuda::workspace_size, "Doubles of scratch that a call needs.");
  m.attr("cuda_architectures") = VADIFF_STRING(VADIFF_CUDA);
#else
  m.attr("cuda_architectures") = py::none();
#endif
}
