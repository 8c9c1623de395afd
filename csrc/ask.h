// Tensors, asked by their own Python methods: so that csrc/ knows no torch. Part of direct.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include "settings.h"

namespace vadiff {
namespace {

namespace py = pybind11;

// What is known of torch: objects of its Python module, held for good.
struct Torch {
  PyObject* tensor;       // torch.Tensor; a subclass has rules of its own
  PyObject* dtypes[4];    // in the order of Dtype
  PyObject* state_dtype;  // of a criterion's buffers
  PyObject* table_dtype;
  PyObject* empty_like;
  PyObject* scalar;       // a float32 one on the CPU
  PyObject* threads;      // torch.get_num_threads
  PyObject* is_cuda;      // name of the attribute that is true for tensors of the CUDA kernels; None: there are none here
  PyObject* usable;       // whether these run on the device of that number
  PyObject* stream;       // address of its current stream
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
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
};
const Names* names;

py::object owned(PyObject* object) {  // a new reference, or the error that Python set
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

int64_t integer(const py::object& number) {
  int64_t value = PyLong_AsLongLong(number.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

Address address(const py::object& number) {
  size_t value = PyLong_AsSize_t(number.ptr());
  if (value == size_t(-1) && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool is_true(PyObject* tensor, PyObject* attribute) { return owned(PyObject_GetAttr(tensor, attribute)).ptr() == Py_True; }

bool answers_true(PyObject* tensor, PyObject* method) {
  return owned(PyObject_CallMethodNoArgs(tensor, method)).ptr() == Py_True;
}

Address address_of(PyObject* tensor) { return address(owned(PyObject_CallMethodNoArgs(tensor, names->data_ptr))); }

int64_t device_of(PyObject* tensor) {  // emulated, a CUDA tensor is on the CPU, whose number is -1
  return std::max<int64_t>(integer(owned(PyObject_CallMethodNoArgs(tensor, names->get_device))), 0);
}

py::object new_empty(PyObject* like, int64_t size) {
  return owned(PyObject_CallMethodOneArg(like, names->new_empty, py::int_(size).ptr()));
}

bool is_plain_type(PyObject* tensor) { return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == torch.tensor; }

// Where a call's tensors have to be.
struct Place {
  PyObject* attribute;  // null: nowhere that a kernel runs
  int64_t device;       // number of the CUDA device; -1: the CPU

  bool is_cuda() const { return device >= 0; }
  bool holds(PyObject* tensor) const { return is_true(tensor, attribute) && (!is_cuda() || device_of(tensor) == device); }

  // Of a plain dense tensor there: its address, or 0 for any other object.
  Address plain(PyObject* tensor, bool requires_grad) const {
    if (!is_plain_type(tensor) || !holds(tensor) || is_true(tensor, names->requires_grad) != requires_grad ||
        !answers_true(tensor, names->is_contiguous) || answers_true(tensor, names->is_neg))
      return 0;
    return address_of(tensor);
  }
};

Place place_of(PyObject* tensor) {
#ifdef VADIFF_CUDA
  if (torch.is_cuda != Py_None && is_true(tensor, torch.is_cuda)) return {torch.is_cuda, device_of(tensor)};
#endif
  return {is_true(tensor, names->is_cpu) ? names->is_cpu : nullptr, -1};
}

bool has_dtype(PyObject* tensor, PyObject* dtype) { return owned(PyObject_GetAttr(tensor, names->dtype)).ptr() == dtype; }

int dtype_of(PyObject* tensor) {  // -1: none that the kernels know
  PyObject* dtype = owned(PyObject_GetAttr(tensor, names->dtype)).ptr();  // torch keeps it alive
  for (int code = 0; code < 4; ++code)
    if (dtype == torch.dtypes[code]) return code;
  return -1;
}

int64_t size_at(const py::object& sizes, Py_ssize_t dim) {
  return integer(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(sizes.ptr(), dim)));
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

bool answered(PyObject* questions) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(questions); ++i) {
    PyObject* pair = PyTuple_GET_ITEM(questions, i);
    if (owned(PyObject_CallNoArgs(PyTuple_GET_ITEM(pair, 0))).ptr() != PyTuple_GET_ITEM(pair, 1)) return false;
  }
  return true;
}

int thread_count() { return int(integer(owned(PyObject_CallNoArgs(torch.threads)))); }

}  // namespace
}  // namespace vadiff
