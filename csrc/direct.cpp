// The short way of a training step, in one call from Python: see vadiff/eager.py.

#include "direct.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <string>
#include <vector>

#include "ask.h"
#include "cpu.h"
#ifdef VADIFF_CUDA
#include "cuda.h"
#endif

namespace vadiff {
namespace {

// What stays with a criterion from step to step: ell of its last one, and its settings. On the CPU ell is no tensor: a fresh one
// per step that lives until the next would lie in the middle of the memory that the network frees and takes again, and move its
// activations about. Touched with the interpreter held only: a step writes to a vector of its own, and then puts it here.
struct Losses {
  std::vector<float> ell, spare;   // `spare` has the memory for the next step
  py::object tensor = py::none();  // on a CUDA device
  py::object bins, half_life, rule, settings;  // the last was made of the others

  py::object settings_of(PyObject* new_bins, PyObject* new_half_life, PyObject* new_rule) {
    if (bins.ptr() != new_bins || half_life.ptr() != new_half_life || rule.ptr() != new_rule) {
      py::object made = owned(PyObject_CallFunctionObjArgs(torch.settings_of, new_bins, new_half_life, new_rule, nullptr));
      settings = made;
      bins = py::reinterpret_borrow<py::object>(new_bins);
      half_life = py::reinterpret_borrow<py::object>(new_half_life);
      rule = py::reinterpret_borrow<py::object>(new_rule);
      return made;
    }
    return settings;
  }

  std::vector<float> take_spare(int64_t samples) {
    std::vector<float> taken;
    if (spare.capacity() <= size_t(4 * samples + 1024)) taken.swap(spare);  // else give it back
    taken.resize(samples);
    return taken;
  }
  void publish(std::vector<float>& written) {
    ell.swap(written);
    spare.swap(written);
    tensor = py::none();
  }
};

// Arguments of a step; every `take_...` says whether it was a plain one.
struct Step {
  Place place;
  RowsTask<float> rows{};
  Address log_snr = 0, base_weight = 0, sample_weight = 0, weight = 0, state = 0, log_weights = 0;
  int64_t samples = 0;
  py::object weights;  // what `weight` is the address of

  bool take_elements(const View& view, Elements* into) const {
    *into = {at<void>(view.data), view.dtype};
    return view.dtype <= kFloat64;
  }

  // Of the prediction's shape.
  bool take_elements(PyObject* tensor, const View& prediction, Elements* into) const {
    View view;
    return view_of_floats(tensor, false, &view) && place.holds(view) && view.same_sizes(prediction) && take_elements(view, into);
  }

  // One float32 per sample.
  bool take_each(PyObject* tensor, Address* into) const {
    View view;
    if (!view_of_floats(tensor, false, &view) || !place.holds(view) || !view.is_vector(kFloat32, samples)) return false;
    *into = view.data;
    return true;
  }

  bool take_each_or_none(PyObject* tensor, Address* into) const { return tensor == Py_None || take_each(tensor, into); }

  // w of each sample, from a function of log-SNR. It may be anybody's, and it takes its time: call it last.
  bool take_weights(PyObject* weigh, PyObject* log_snr) {
    if (weigh == Py_None) return true;
    weights = owned(PyObject_CallOneArg(weigh, log_snr));
    return take_each(weights.ptr(), &weight);
  }

  // A buffer of the criterion, with so many integers of that dtype: nobody negates these lazily, and they require no grad.
  bool take_buffer(PyObject* tensor, int dtype, int64_t size, Address* into) const {
    View view;
    if (!view_tensor(tensor, &view) || !place.holds(view) || !view.is_vector(dtype, size)) return false;
    *into = view.data;
    return true;
  }

  // Memory for so many numbers that torch was just asked for; false if somebody who watches made something else of it.
  template <class T>
  bool take_made(const py::object& tensor, int dtype, int64_t size, T** into) const {
    View view;
    if (!view_tensor(tensor.ptr(), &view) || !place.holds(view) || view.dtype != dtype || view.count() != size) return false;
    *into = at<T>(view.data);
    return true;
  }

  bool take_gradient(const py::object& tensor) {
    return take_made(tensor, rows.output.dtype, samples * rows.elements, &rows.gradient);
  }

  // `reads`: whether it is anything but the number 0.
  bool take_coefficient(PyObject* coefficient, float* number, const float** each, bool* reads) const {
    *reads = true;
    if (PyFloat_CheckExact(coefficient) || PyLong_CheckExact(coefficient)) {
      double value = PyFloat_AsDouble(coefficient);
      if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
      *number = float(value);
      *reads = value != 0.0;
      return true;
    }
    Address address = 0;
    if (!take_each(coefficient, &address)) return false;
    *each = at<float>(address);
    return true;
  }

  bool take_residual(PyObject* coefficients, PyObject* target, PyObject* noise, const View& prediction) {
    rows.a = 1, rows.b = -1, rows.c = 0;
    if (coefficients == Py_None) return noise == Py_None && take_elements(target, prediction, &rows.target);
    if (!PyTuple_CheckExact(coefficients) || PyTuple_GET_SIZE(coefficients) != 3) return false;
    bool reads_output, reads_target, reads_noise;
    if (!take_coefficient(PyTuple_GET_ITEM(coefficients, 0), &rows.a, &rows.a_each, &reads_output) ||
        !take_coefficient(PyTuple_GET_ITEM(coefficients, 1), &rows.b, &rows.b_each, &reads_target) ||
        !take_coefficient(PyTuple_GET_ITEM(coefficients, 2), &rows.c, &rows.c_each, &reads_noise) ||
        !take_elements(target, prediction, &rows.target))
      return false;
    if (!reads_target) rows.target = {};
    if (noise == Py_None) return !reads_noise;
    if (!take_elements(noise, prediction, &rows.noise)) return false;
    if (!reads_noise) rows.noise = {};
    return true;
  }
};

// As vadiff/backends.py decides; on CUDA devices "auto" is Triton's.
bool chosen(PyObject* backend, int kind) {
  if (!PyUnicode_Check(backend)) return false;
  if (PyUnicode_CompareWithASCIIString(backend, "native") == 0) return true;
  if (PyUnicode_CompareWithASCIIString(backend, "auto") != 0) return false;
  const char* variable = getenv("VADIFF_BACKEND");
  if (!variable || !*variable || !strcmp(variable, "auto")) return !is_cuda(kind);
  return !strcmp(variable, "native");
}

enum Argument { kPrediction, kTarget, kNoise, kCoefficients, kLogSnr, kBaseWeight, kSampleWeight, kWeigh, kState, kLogWeights,
                kBins, kHalfLife, kRule, kHuberDelta, kBackend, kLosses, kArguments };

#ifdef VADIFF_CUDA
bool runs_on(int64_t device) {
  static char known[64];  // 1: yes, 2: no
  if (device >= 64) return false;
  if (!known[device]) known[device] = owned(PyObject_CallOneArg(torch.usable, py::int_(device).ptr())).ptr() == Py_True ? 1 : 2;
  return known[device] == 1;
}

Where where_on(const Place& place, double* workspace) {
  const Address stream = address(owned(PyObject_CallOneArg(torch.stream, py::int_(place.device).ptr())));
  return {int(place.device), at<void>(stream), workspace};
}

// (loss, gradient, saved): the backward asks `saved` whether the batch was poisoned, as nobody here waits for the device.
py::object cuda_step(Step& step, const Settings& settings, Losses& losses, PyObject* const* given) {
  const int64_t samples = step.samples;
  py::object gradient = owned(PyObject_CallOneArg(torch.empty_like, given[kPrediction]));
  py::object loss = owned(PyObject_CallMethodOneArg(given[kLogSnr], names->new_empty, py::tuple().ptr()));
  py::object saved = new_empty(given[kLogSnr], 2 * samples + 1), ell = new_empty(given[kLogSnr], samples);
  const int64_t workspace_size =
      cuda::workspace_size(samples, step.rows.elements, settings.bins.size, int(step.place.device));
  py::object workspace = new_empty(given[kState], workspace_size);  // for doubles, of the size of the state's integers
  Results<float> results{nullptr, nullptr, nullptr, true};
  double* scratch;
  if (!step.take_gradient(gradient) || !step.take_made(ell, kFloat32, samples, &results.ell) ||
      !step.take_made(loss, kFloat32, 1, &results.loss) || !step.take_made(saved, kFloat32, 2 * samples + 1, &results.saved) ||
      !step.take_made(workspace, kInt64, workspace_size, &scratch))
    return py::none();
  const Where where = where_on(step.place, scratch);
  {
    py::gil_scoped_release release;  // a launch waits where too many are queued already
    diffusion_loss<float>(
        step.rows, samples,
        settings.levels<float>(step.log_snr, step.base_weight, step.sample_weight, step.weight, step.log_weights), results,
        settings.update(true, step.state, step.log_weights, 0), where);
  }
  losses.tensor = ell;
  return py::make_tuple(loss, gradient, saved);
}
#endif

// (loss, gradient).
py::object cpu_step(Step& step, const Settings& settings, Losses& losses, PyObject* const* given) {
  py::object gradient = owned(PyObject_CallOneArg(torch.empty_like, given[kPrediction]));
  py::object loss = owned(PyObject_CallOneArg(torch.empty_like, torch.scalar));
  float* mean;
  if (!step.take_gradient(gradient) || !step.take_made(loss, kFloat32, 1, &mean)) return py::none();
  const int threads = thread_count();
  std::vector<float> ell = losses.take_spare(step.samples);
  {
    py::gil_scoped_release release;
    diffusion_loss<float>(step.rows, step.samples,
                          settings.levels<float>(step.log_snr, step.base_weight, step.sample_weight, step.weight,
                                                 step.log_weights),
                          {ell.data(), mean, nullptr, true},
                          settings.update(true, step.state, step.log_weights, 0), threads);
    if (*mean != *mean) {  // a poisoned batch: the backward has nothing but the gradient to tell it
      const float one = 1;
      scale_gradient<float>(step.rows.gradient, step.rows.gradient, step.rows.output.dtype,
                            step.samples * step.rows.elements, &one, mean, threads);
    }
  }
  losses.publish(ell);
  return py::make_tuple(loss, gradient);
}

// What the backward needs and the loss before it, or None if the call has to take the long way.
py::object direct_step(PyObject* const* given) {
  View prediction;
  const int kind = kind_of(given[kPrediction]);
  if (!kind || !chosen(given[kBackend], kind) || !answered(torch.forward) ||
      !view_of_floats(given[kPrediction], true, &prediction) || prediction.kind != kind)
    return py::none();
  Step step{Place(prediction)};
#ifdef VADIFF_CUDA
  if (step.place.is_cuda() && !runs_on(step.place.device)) return py::none();
#endif
  Losses& losses = py::cast<Losses&>(py::handle(given[kLosses]));
  const py::object held = losses.settings_of(given[kBins], given[kHalfLife], given[kRule]);
  const Settings& settings = py::cast<const Settings&>(held);
  step.samples = prediction.samples();
  step.rows.elements = prediction.elements();
  if (step.rows.elements == 0 || !step.take_elements(prediction, &step.rows.output) ||
      (step.rows.output.dtype != kFloat32 && step.rows.output.dtype != kBfloat16) ||
      !step.take_residual(given[kCoefficients], given[kTarget], given[kNoise], prediction) ||
      !step.take_each(given[kLogSnr], &step.log_snr) || !step.take_each_or_none(given[kBaseWeight], &step.base_weight) ||
      !step.take_each_or_none(given[kSampleWeight], &step.sample_weight) ||
      !step.take_buffer(given[kState], kInt64, 4 * int64_t(settings.bins.size) + 2, &step.state) ||
      !step.take_buffer(given[kLogWeights], kInt32, settings.bins.size, &step.log_weights) ||
      !step.take_weights(given[kWeigh], given[kLogSnr]))
    return py::none();
  const double huber_delta = PyFloat_AsDouble(given[kHuberDelta]);
  if (huber_delta == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  step.rows.huber_delta = float(huber_delta);
#ifdef VADIFF_CUDA
  if (step.place.is_cuda()) return cuda_step(step, settings, losses, given);
#endif
  return cpu_step(step, settings, losses, given);
}

// Scales a gradient that `direct_step` made in place and says true, or false if the backward has to take the long way. `saved`
// is null on the CPU.
bool direct_scale(PyObject* upstream, PyObject* gradient, PyObject* saved) {
  View factor, made;
  const int kind = kind_of(upstream);
  if (!kind || !answered(torch.backward) || !view_of_floats(upstream, false, &factor) || factor.kind != kind ||
      factor.dtype != kFloat32)
    return false;
  const Place place(factor);
  if (!place.is_cuda() && *at<float>(factor.data) == 1) return true;
  if (!view_of_floats(gradient, false, &made) || !place.holds(made)) return false;
  if (made.dtype != kFloat32 && made.dtype != kBfloat16) return false;  // what a hook on saved tensors made of it
  void* data = at<void>(made.data);
  const int64_t size = made.samples() * made.elements();
#ifdef VADIFF_CUDA
  if (place.is_cuda()) {
    View results;
    if (!saved || !view_of_floats(saved, false, &results) || !place.holds(results) || results.dtype != kFloat32) return false;
    const float* mean_loss = at<float>(results.data) + results.samples() - 1;
    const Where where = where_on(place, nullptr);
    py::gil_scoped_release release;
    scale_gradient<float>(data, data, made.dtype, size, at<float>(factor.data), mean_loss, where);
    return true;
  }
#endif
  const float not_poisoned = 0;
  const int threads = thread_count();
  py::gil_scoped_release release;
  scale_gradient<float>(data, data, made.dtype, size, at<float>(factor.data), &not_poisoned, threads);
  return true;
}

// Without pybind11's dispatch, which for so many arguments takes as long as a small batch; its errors are Python's all the same.
template <class Run>
PyObject* for_python(Py_ssize_t count, Py_ssize_t least, Py_ssize_t most, Run run) {
  try {
    if (!torch.tensor) throw std::runtime_error("called before know_torch");
    if (count < least || count > most) throw py::type_error("expected " + std::to_string(most) + " arguments");
    return run().release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* direct_step_for_python(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return for_python(count, kArguments, kArguments, [=] { return direct_step(given); });
}

PyObject* direct_scale_for_python(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return for_python(count, 2, 3, [=] { return py::bool_(direct_scale(given[0], given[1], count == 3 ? given[2] : nullptr)); });
}

PyCFunction fast_call(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"direct_step", fast_call(&direct_step_for_python), METH_FASTCALL, "See vadiff.eager."},
    {"direct_scale", fast_call(&direct_scale_for_python), METH_FASTCALL, "See vadiff.eager."},
    {nullptr, nullptr, 0, nullptr},
};

bool know_torch(const py::object& tensor, const py::tuple& dtypes, const py::object& exchange, const py::object& empty_like,
                const py::object& scalar, const py::object& threads, int cuda, const py::object& settings_of,
                const py::object& usable, const py::object& stream, const py::tuple& forward, const py::tuple& backward) {
  torch.tensor = tensor.inc_ref().ptr();
  for (int code = 0; code < kDtypes; ++code) torch.dtypes[code] = py::object(dtypes[code]).inc_ref().ptr();
  torch.exchange = exchange_of(exchange.inc_ref());
  torch.empty_like = empty_like.inc_ref().ptr();
  torch.scalar = scalar.inc_ref().ptr();
  torch.threads = threads.inc_ref().ptr();
  torch.cuda = cuda;
  torch.settings_of = settings_of.inc_ref().ptr();
  torch.usable = usable.inc_ref().ptr();
  torch.stream = stream.inc_ref().ptr();
  torch.forward = forward.inc_ref().ptr();
  torch.backward = backward.inc_ref().ptr();
  return torch.exchange != nullptr;
}

}  // namespace

void define_direct_step(py::module_& m) {
  names = new Names;
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  py::class_<Losses>(m, "Losses", py::module_local(), "Per-sample losses of a criterion's last step.")
      .def(py::init<>())
      .def_readonly("tensor", &Losses::tensor, "They, on a CUDA device; None on the CPU.")
      .def("copy", [](const Losses& losses) {
        return py::bytearray(reinterpret_cast<const char*>(losses.ell.data()), losses.ell.size() * sizeof(float));
      }, "Their bytes, float32.")
      .def("__reduce__", [](const py::object& self) { return py::make_tuple(py::type::of(self), py::tuple()); });  // no copies
  m.def("know_torch", &know_torch, "What the two above need of torch; before their first call. Says whether they use DLPack's table.");
}

}  // namespace vadiff
