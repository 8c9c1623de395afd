// Tensors, asked for what the kernels need of them: by DLPack's table of C functions where torch.Tensor offers one (from 2.10
// on), else by its Python attributes. So csrc/ knows no torch. Part of direct.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include "settings.h"

namespace vadiff {
namespace {

namespace py = pybind11;

// What a criterion's buffers have, after the floats of Dtype.
constexpr int kInt64 = 4, kInt32 = 5, kDtypes = 6;

// DLPack's binary interface, https://dmlc.github.io/dlpack/latest/c_api.html, version 1.
struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchange {
  struct { uint32_t major, minor; } version;
  void *older, *allocate, *managed_from_object, *managed_to_object;
  int (*from_object)(void* object, DLTensor* into);  // borrowed; 0, or -1 with a Python error. May be null
  void* current_stream;
};
constexpr int kDLCpu = 1, kDLCuda = 2;

// What is known of torch and of vadiff: objects of their Python modules, held for good.
struct Torch {
  PyObject* tensor;           // torch.Tensor; a subclass has rules of its own
  PyObject* dtypes[kDtypes];  // in the order of Dtype, then int64 and int32
  const DLPackExchange* exchange;  // null: ask by attributes
  PyObject* empty_like;
  PyObject* scalar;       // a float32 one on the CPU
  PyObject* threads;      // torch.get_num_threads
  int cuda;               // DLPack's number of the kind of device that the CUDA kernels run on; 0: there are none here
  PyObject* settings_of;  // vadiff.native's: makes Settings of bins, half-life and rule
  PyObject* usable;       // whether these run on the device of that number
  PyObject* stream;       // address of its current stream
  PyObject* forward;      // ((question, answer), ...): no argument, and the object answered where the short way may be taken
  PyObject* backward;
} torch;

// The table in torch.Tensor's capsule; null where there is none that fits.
const DLPackExchange* exchange_of(py::handle capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto found = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return found->version.major == 1 && found->from_object ? found : nullptr;
}

// Names of Python attributes, made once.
struct Names {
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  // Where there is no DLPackExchange.
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
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

bool is_plain_type(PyObject* tensor) { return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == torch.tensor; }

// A tensor as the kernels see it: dense, in C's order.
struct View {
  static constexpr int kMostDims = 16;
  Address data;
  int dtype;           // Dtype, kInt64 or kInt32
  int kind;            // of device, as DLPack numbers them
  int64_t device;      // its number
  int dims;
  int64_t sizes[kMostDims];

  int64_t samples() const { return dims ? sizes[0] : 0; }
  int64_t elements() const {  // of a sample; 0 where any size is
    if (!dims || std::find(sizes, sizes + dims, 0) != sizes + dims) return 0;  // the others' product may overflow
    int64_t product = 1;
    for (int d = 1; d < dims; ++d) product *= sizes[d];
    return product;
  }
  int64_t count() const { return dims ? samples() * elements() : 1; }
  bool same_sizes(const View& other) const { return dims == other.dims && std::equal(sizes, sizes + dims, other.sizes); }
  bool is_vector(int of_dtype, int64_t size) const { return dtype == of_dtype && dims == 1 && sizes[0] == size; }
};

int dtype_of(const DLTensor& tensor) {  // -1: none that the kernels know
  enum { kInt = 0, kFloat = 2, kBfloat = 4 };
  const int code = tensor.dtype.code, bits = tensor.dtype.bits;
  if (tensor.dtype.lanes != 1) return -1;
  if (code == kBfloat) return bits == 16 ? int(kBfloat16) : -1;
  if (code == kFloat) return bits == 32 ? kFloat32 : bits == 16 ? kFloat16 : bits == 64 ? kFloat64 : -1;
  return code != kInt ? -1 : bits == 64 ? kInt64 : bits == 32 ? kInt32 : -1;
}

bool view_by_exchange(PyObject* tensor, View* into) {
  DLTensor found;
  if (torch.exchange->from_object(tensor, &found) != 0) {  // of a layout or on a device that DLPack has no word for
    PyErr_Clear();
    return false;
  }
  if (found.ndim < 0 || found.ndim > View::kMostDims) return false;
  *into = {reinterpret_cast<Address>(found.data) + (found.data ? found.byte_offset : 0), dtype_of(found), found.device.type,
           found.device.id, found.ndim, {}};
  int64_t dense = 1;
  for (int d = found.ndim - 1; d >= 0; --d) {
    if (found.shape[d] != 1 && found.strides[d] != dense) return false;
    into->sizes[d] = found.shape[d];
    dense *= std::max<int64_t>(found.shape[d], 1);
  }
  return true;
}

bool view_by_attributes(PyObject* tensor, View* into) try {
  const bool cuda = is_true(tensor, names->is_cuda);
  if ((!cuda && !is_true(tensor, names->is_cpu)) || !answers_true(tensor, names->is_contiguous)) return false;
  const py::object sizes = owned(PyObject_GetAttr(tensor, names->shape)), dtype = owned(PyObject_GetAttr(tensor, names->dtype));
  const Py_ssize_t dims = PyTuple_Check(sizes.ptr()) ? PyTuple_GET_SIZE(sizes.ptr()) : -1;
  if (dims < 0 || dims > View::kMostDims) return false;
  const int code = int(std::find(torch.dtypes, torch.dtypes + kDtypes, dtype.ptr()) - torch.dtypes);
  *into = {address(owned(PyObject_CallMethodNoArgs(tensor, names->data_ptr))), code < kDtypes ? code : -1,
           cuda ? kDLCuda : kDLCpu, cuda ? integer(owned(PyObject_CallMethodNoArgs(tensor, names->get_device))) : 0,
           int(dims), {}};
  for (Py_ssize_t d = 0; d < dims; ++d)
    into->sizes[d] = integer(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(sizes.ptr(), d)));
  return true;
} catch (const py::error_already_set& error) {  // of a layout that has no such thing
  if (!error.matches(PyExc_Exception)) throw;
  return false;
}

// Whether it is a plain tensor with memory, dense, of a dtype that the kernels know.
bool view_tensor(PyObject* tensor, View* into) {
  return is_plain_type(tensor) && (torch.exchange ? view_by_exchange(tensor, into) : view_by_attributes(tensor, into)) &&
         into->data && into->dtype >= 0;
}

// The same for floats, which could also require grad, or be negated only when they are read.
bool view_of_floats(PyObject* tensor, bool requires_grad, View* into) {
  return view_tensor(tensor, into) && is_true(tensor, names->requires_grad) == requires_grad && !answers_true(tensor, names->is_neg);
}

py::object new_empty(PyObject* like, int64_t size) {
  return owned(PyObject_CallMethodOneArg(like, names->new_empty, py::int_(size).ptr()));
}

// Of device; 0: none that a kernel runs on. DLPack's functions take a millisecond to refuse those that they have no word for.
int kind_of(PyObject* tensor) {
  if (!is_plain_type(tensor)) return 0;
  if (is_true(tensor, names->is_cpu)) return kDLCpu;
  return torch.cuda && is_true(tensor, names->is_cuda) ? torch.cuda : 0;
}

bool is_cuda(int kind) { return kind == torch.cuda; }  // emulated, a CUDA tensor is on the CPU

// Where a call's tensors have to be.
struct Place {
  int kind;
  int64_t device;

  explicit Place(const View& view) : kind(view.kind), device(view.device) {}
  bool is_cuda() const { return vadiff::is_cuda(kind); }
  bool holds(const View& view) const { return view.kind == kind && view.device == device; }
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
