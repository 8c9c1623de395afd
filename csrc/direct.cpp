// The short way of a training step on the CPU, in one call from Python: see vadiff/eager.py. Tensors are asked by their own
// Python methods, so that this knows no torch either.

#include "direct.h"

#include <stdlib.h>
#include <string.h>

#include <new>
#include <string>
#include <vector>

#include "cpu.h"
#include "settings.h"

namespace py = pybind11;

namespace vadiff {
namespace {

// What is known of torch: objects of its Python module, held for good.
struct Torch {
  PyObject* tensor;       // torch.Tensor; a subclass has rules of its own
  PyObject* dtypes[4];    // in the order of Dtype
  PyObject* state_dtype;  // of a criterion's buffers
  PyObject* table_dtype;
  PyObject* empty_like;
  PyObject* scalar;       // a float32 one on the CPU
  PyObject* threads;      // torch.get_num_threads
  PyObject* forward;      // ((question, answer), ...): no argument, and the object answered where the short way may be taken
  PyObject* backward;
} torch;

// Names of Python attributes, made once.
struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* numel = PyUnicode_InternFromString("numel");
};
const Names* names;

py::object owned(PyObject* object) {  // a new reference, or the error that Python set
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

bool is_true(PyObject* tensor, PyObject* attribute) { return owned(PyObject_GetAttr(tensor, attribute)).ptr() == Py_True; }

bool answers_true(PyObject* tensor, PyObject* method) {
  return owned(PyObject_CallMethodNoArgs(tensor, method)).ptr() == Py_True;
}

Address address_of(PyObject* tensor) {
  size_t address = PyLong_AsSize_t(owned(PyObject_CallMethodNoArgs(tensor, names->data_ptr)).ptr());
  if (address == size_t(-1) && PyErr_Occurred()) throw py::error_already_set();
  return address;
}

bool is_plain_type(PyObject* tensor) { return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == torch.tensor; }

// Of a plain dense tensor on the CPU: its address, or 0 for any other object.
Address plain(PyObject* tensor, bool requires_grad) {
  if (!is_plain_type(tensor) || !is_true(tensor, names->is_cpu) ||
      is_true(tensor, names->requires_grad) != requires_grad || !answers_true(tensor, names->is_contiguous) ||
      answers_true(tensor, names->is_neg))
    return 0;
  return address_of(tensor);
}

bool has_dtype(PyObject* tensor, PyObject* dtype) { return owned(PyObject_GetAttr(tensor, names->dtype)).ptr() == dtype; }

int dtype_of(PyObject* tensor) {  // -1: none that the kernels know
  PyObject* dtype = owned(PyObject_GetAttr(tensor, names->dtype)).ptr();  // torch keeps it alive
  for (int code = 0; code < 4; ++code)
    if (dtype == torch.dtypes[code]) return code;
  return -1;
}

int64_t size_at(const py::object& sizes, Py_ssize_t dim) {
  int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), dim));
  if (size == -1 && PyErr_Occurred()) throw py::error_already_set();
  return size;
}

// Shape of the prediction, and what follows from it. Where one of its sizes is 0, so are both numbers.
struct Shape {
  py::object sizes;  // torch.Size
  int64_t samples = 0, elements = 0;

  explicit Shape(PyObject* tensor) : sizes(owned(PyObject_GetAttr(tensor, names->shape))) {
    if (!PyTuple_Check(sizes.ptr()) || PyTuple_GET_SIZE(sizes.ptr()) == 0) return;
    const Py_ssize_t dims = PyTuple_GET_SIZE(sizes.ptr());
    for (Py_ssize_t d = 0; d < dims; ++d)
      if (size_at(sizes, d) == 0) return;  // the others' product may be more than an integer holds
    samples = size_at(sizes, 0);
    elements = 1;
    for (Py_ssize_t d = 1; d < dims; ++d) elements *= size_at(sizes, d);
  }

  bool same(PyObject* tensor) const {
    int equal = PyObject_RichCompareBool(sizes.ptr(), owned(PyObject_GetAttr(tensor, names->shape)).ptr(), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    return equal == 1;
  }
};

// ell of a criterion's last step. Not a tensor: a fresh one per step that lives until the next would lie in the middle of the
// memory that the network frees and takes again, and move its activations about.
struct Losses {
  std::vector<float> ell;
  bool busy = false;  // a thread that has let go of the interpreter is writing

  struct Writing {
    Losses& losses;
    explicit Writing(Losses& losses) : losses(losses) { losses.busy = true; }
    ~Writing() { losses.busy = false; }
  };
};

// Arguments of a step; every `take_...` says whether it was a plain one.
struct Step {
  RowsTask<float> rows{};
  Address log_snr = 0, base_weight = 0, sample_weight = 0, weight = 0, state = 0, log_weights = 0;
  int64_t samples = 0;
  py::object weights;  // what `weight` is the address of

  static bool take_elements(PyObject* tensor, const Shape& shape, bool requires_grad, Elements* into) {
    Address address = plain(tensor, requires_grad);
    if (!address || !shape.same(tensor)) return false;
    *into = {at<void>(address), dtype_of(tensor)};
    return into->dtype >= 0;
  }

  // One float32 per sample.
  bool take_each(PyObject* tensor, Address* into) const {
    *into = plain(tensor, false);
    if (!*into || dtype_of(tensor) != kFloat32) return false;
    py::object sizes = owned(PyObject_GetAttr(tensor, names->shape));
    return PyTuple_Check(sizes.ptr()) && PyTuple_GET_SIZE(sizes.ptr()) == 1 && size_at(sizes, 0) == samples;
  }

  bool take_each_or_none(PyObject* tensor, Address* into) const { return tensor == Py_None || take_each(tensor, into); }

  // w of each sample, from a function of log-SNR. It may be anybody's, and it takes its time: call it last.
  bool take_weights(PyObject* weigh, PyObject* log_snr) {
    if (weigh == Py_None) return true;
    weights = owned(PyObject_CallOneArg(weigh, log_snr));
    return take_each(weights.ptr(), &weight);
  }

  // A buffer of the criterion, with so many integers of that dtype: no integer requires grad or is lazily negated.
  static bool take_buffer(PyObject* tensor, PyObject* dtype, int64_t size, Address* into) {
    if (!is_plain_type(tensor) || !has_dtype(tensor, dtype) || !is_true(tensor, names->is_cpu) ||
        !answers_true(tensor, names->is_contiguous))
      return false;
    *into = address_of(tensor);
    if (!*into) return false;
    int64_t length = PyLong_AsLongLong(owned(PyObject_CallMethodNoArgs(tensor, names->numel)).ptr());
    if (length == -1 && PyErr_Occurred()) throw py::error_already_set();
    return length == size;
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

  bool take_residual(PyObject* coefficients, PyObject* target, PyObject* noise, const Shape& shape) {
    rows.a = 1, rows.b = -1, rows.c = 0;
    if (coefficients == Py_None) return noise == Py_None && take_elements(target, shape, false, &rows.target);
    if (!PyTuple_CheckExact(coefficients) || PyTuple_GET_SIZE(coefficients) != 3) return false;
    bool reads_output, reads_target, reads_noise;
    if (!take_coefficient(PyTuple_GET_ITEM(coefficients, 0), &rows.a, &rows.a_each, &reads_output) ||
        !take_coefficient(PyTuple_GET_ITEM(coefficients, 1), &rows.b, &rows.b_each, &reads_target) ||
        !take_coefficient(PyTuple_GET_ITEM(coefficients, 2), &rows.c, &rows.c_each, &reads_noise) ||
        !take_elements(target, shape, false, &rows.target))
      return false;
    if (!reads_target) rows.target = {};
    if (noise == Py_None) return !reads_noise;
    if (!take_elements(noise, shape, false, &rows.noise)) return false;
    if (!reads_noise) rows.noise = {};
    return true;
  }
};

bool answered(PyObject* questions) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(questions); ++i) {
    PyObject* pair = PyTuple_GET_ITEM(questions, i);
    if (owned(PyObject_CallNoArgs(PyTuple_GET_ITEM(pair, 0))).ptr() != PyTuple_GET_ITEM(pair, 1)) return false;
  }
  return true;
}

// As vadiff/backends.py decides, for a CPU tensor.
bool chosen(PyObject* backend) {
  if (!PyUnicode_Check(backend)) return false;
  if (PyUnicode_CompareWithASCIIString(backend, "native") == 0) return true;
  if (PyUnicode_CompareWithASCIIString(backend, "auto") != 0) return false;
  const char* variable = getenv("VADIFF_BACKEND");
  return !variable || !*variable || !strcmp(variable, "auto") || !strcmp(variable, "native");
}

int thread_count() {
  long threads = PyLong_AsLong(owned(PyObject_CallNoArgs(torch.threads)).ptr());
  if (threads == -1 && PyErr_Occurred()) throw py::error_already_set();
  return int(threads);
}

enum Argument { kPrediction, kTarget, kNoise, kCoefficients, kLogSnr, kBaseWeight, kSampleWeight, kWeigh, kState, kLogWeights,
                kSettings, kHuberDelta, kBackend, kLosses, kArguments };

// (loss, gradient), or None if the call has to take the long way.
py::object direct_step(PyObject* const* given) {
  if (!chosen(given[kBackend]) || !answered(torch.forward)) return py::none();
  const Settings& settings = py::cast<const Settings&>(py::handle(given[kSettings]));
  Losses& losses = py::cast<Losses&>(py::handle(given[kLosses]));
  if (losses.busy) return py::none();
  Step step;
  PyObject* prediction = given[kPrediction];
  if (!is_plain_type(prediction)) return py::none();
  Shape shape(prediction);
  if (shape.samples <= 0 || shape.elements <= 0) return py::none();
  step.samples = shape.samples;
  step.rows.elements = shape.elements;
  if (!Step::take_elements(prediction, shape, true, &step.rows.output) ||
      (step.rows.output.dtype != kFloat32 && step.rows.output.dtype != kBfloat16) ||
      !step.take_residual(given[kCoefficients], given[kTarget], given[kNoise], shape) ||
      !step.take_each(given[kLogSnr], &step.log_snr) || !step.take_each_or_none(given[kBaseWeight], &step.base_weight) ||
      !step.take_each_or_none(given[kSampleWeight], &step.sample_weight) ||
      !Step::take_buffer(given[kState], torch.state_dtype, 4 * int64_t(settings.bins.size) + 2, &step.state) ||
      !Step::take_buffer(given[kLogWeights], torch.table_dtype, settings.bins.size, &step.log_weights) ||
      !step.take_weights(given[kWeigh], given[kLogSnr]))
    return py::none();
  const double huber_delta = PyFloat_AsDouble(given[kHuberDelta]);
  if (huber_delta == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  step.rows.huber_delta = float(huber_delta);

  py::object gradient = owned(PyObject_CallOneArg(torch.empty_like, prediction));
  py::object loss = owned(PyObject_CallOneArg(torch.empty_like, torch.scalar));
  step.rows.gradient = at<void>(address_of(gradient.ptr()));
  const int threads = thread_count();
  losses.ell.resize(step.samples);
  float* mean = at<float>(address_of(loss.ptr()));
  {
    Losses::Writing writing(losses);
    py::gil_scoped_release release;
    diffusion_loss<float>(step.rows, step.samples,
                          settings.levels<float>(step.log_snr, step.base_weight, step.sample_weight, step.weight,
                                                 step.log_weights),
                          {losses.ell.data(), mean, nullptr, true},
                          settings.update(true, step.state, step.log_weights, 0), threads);
    if (*mean != *mean) {  // a poisoned batch: the backward has nothing but the gradient to tell it
      const float one = 1;
      scale_gradient<float>(step.rows.gradient, step.rows.gradient, step.rows.output.dtype,
                            step.samples * step.rows.elements, &one, mean, threads);
    }
  }
  return py::make_tuple(loss, gradient);
}

// Scales a gradient that `direct_step` made in place and says true, or false if the backward has to take the long way.
bool direct_scale(PyObject* gradient, PyObject* upstream) {
  if (!answered(torch.backward)) return false;
  const Address factor = plain(upstream, false);
  if (!factor || dtype_of(upstream) != kFloat32) return false;
  if (*at<float>(factor) == 1) return true;
  const Address data = plain(gradient, false);
  const int dtype = data ? dtype_of(gradient) : -1;
  if (dtype < 0) return false;
  const Shape shape(gradient);
  const float not_poisoned = 0;
  const int threads = thread_count();
  py::gil_scoped_release release;
  scale_gradient<float>(at<void>(data), at<void>(data), dtype, shape.samples * shape.elements, at<float>(factor),
                        &not_poisoned, threads);
  return true;
}

// Without pybind11's dispatch, which for so many arguments takes as long as a small batch; its errors are Python's all the same.
template <class Run>
PyObject* for_python(Py_ssize_t count, Py_ssize_t expected, Run run) {
  try {
    if (!torch.tensor) throw std::runtime_error("called before know_torch");
    if (count != expected) throw py::type_error("expected " + std::to_string(expected) + " arguments");
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
  return for_python(count, kArguments, [=] { return direct_step(given); });
}

PyObject* direct_scale_for_python(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return for_python(count, 2, [=] { return py::bool_(direct_scale(given[0], given[1])); });
}

PyCFunction fast_call(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"direct_step", fast_call(&direct_step_for_python), METH_FASTCALL, "See vadiff.eager."},
    {"direct_scale", fast_call(&direct_scale_for_python), METH_FASTCALL, "See vadiff.eager."},
    {nullptr, nullptr, 0, nullptr},
};

void know_torch(const py::object& tensor, const py::tuple& dtypes, const py::object& state_dtype, const py::object& table_dtype,
                const py::object& empty_like, const py::object& scalar, const py::object& threads, const py::tuple& forward, const py::tuple& backward) {
  torch.tensor = tensor.inc_ref().ptr();
  for (int code = 0; code < 4; ++code) torch.dtypes[code] = py::object(dtypes[code]).inc_ref().ptr();
  torch.state_dtype = state_dtype.inc_ref().ptr();
  torch.table_dtype = table_dtype.inc_ref().ptr();
  torch.empty_like = empty_like.inc_ref().ptr();
  torch.scalar = scalar.inc_ref().ptr();
  torch.threads = threads.inc_ref().ptr();
  torch.forward = forward.inc_ref().ptr();
  torch.backward = backward.inc_ref().ptr();
}

}  // namespace

void define_direct_step(py::module_& m) {
  names = new Names;
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  py::class_<Losses>(m, "Losses", "Per-sample losses of a criterion's last step.")
      .def(py::init<>())
      .def("copy", [](const Losses& losses) {
        return py::bytearray(reinterpret_cast<const char*>(losses.ell.data()), losses.ell.size() * sizeof(float));
      }, "Their bytes, float32.");
  m.def("know_torch", &know_torch, "What the two above need of torch; before their first call.");
}

}  // namespace vadiff
