#include "core/view.h"

#include <algorithm>
#include <cstring>
#include <pybind11/numpy.h>

namespace gg {
namespace {

std::string shape_text(const int64_t *shape, int ndim) {
  std::string s = "(";
  for (int i = 0; i < ndim; ++i)
    s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

// The exchange API of a type, looked up once per type: the attribute lookup alone costs more than the borrowing.
const dlpack::Exchange *exchange_of(PyTypeObject *type) {
  struct Entry {
    PyTypeObject *type;
    const dlpack::Exchange *api;
  };
  static Entry cache[16];
  static int known = 0;
  for (int i = 0; i < known; ++i)
    if (cache[i].type == type)
      return cache[i].api;

  const dlpack::Exchange *api = nullptr;
  static PyObject *attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject *capsule = PyObject_GetAttr(reinterpret_cast<PyObject *>(type), attribute);
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    auto *header = static_cast<dlpack::ExchangeHeader *>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (header && header->version.major != 1)
      header = header->previous;
    api = reinterpret_cast<const dlpack::Exchange *>(header);
  }
  Py_XDECREF(capsule);
  PyErr_Clear();
  if (known < 16) {
    Py_INCREF(type);
    cache[known++] = {type, api};
  }
  return api;
}

bool dtype_from(dlpack::Type t, DType &out) {
  if (t.lanes != 1)
    return false;
  const struct {
    uint8_t code, bits;
    DType dtype;
  } known[] = {{dlpack::ieee_float, 32, DType::f32}, {dlpack::ieee_float, 64, DType::f64},
               {dlpack::bfloat, 16, DType::bf16},    {dlpack::ieee_float, 16, DType::f16},
               {dlpack::signed_int, 32, DType::i32}, {dlpack::signed_int, 64, DType::i64},
               {dlpack::boolean, 8, DType::boolean}};
  for (auto &k : known)
    if (k.code == t.code && k.bits == t.bits) {
      out = k.dtype;
      return true;
    }
  return false;
}

bool dtype_from(const char *format, int64_t item, DType &out) {
  if (!format || !format[0])
    return false;
  char kind = format[0] == '@' || format[0] == '=' || format[0] == '<' ? format[1] : format[0];
  if (std::strchr("ilq", kind) && (item == 4 || item == 8))
    return out = item == 4 ? DType::i32 : DType::i64, true;
  if (kind == '?' && item == 1)
    return out = DType::boolean, true;
  if ((kind == 'f' && item == 4) || (kind == 'd' && item == 8) || (kind == 'e' && item == 2))
    return out = kind == 'f' ? DType::f32 : kind == 'd' ? DType::f64 : DType::f16, true;
  return false;
}

bool dtype_from(const py::dtype &t, DType &out) {
  if (t.byteorder() != '=' && t.byteorder() != '|')
    return false;
  using numpy = py::detail::npy_api;
  constexpr int half = 23; // NPY_HALF, which pybind11 has no name for
  switch (t.normalized_num()) {
  case numpy::NPY_FLOAT_: return out = DType::f32, true;
  case numpy::NPY_DOUBLE_: return out = DType::f64, true;
  case half: return out = DType::f16, true;
  case numpy::NPY_INT32_: return out = DType::i32, true;
  case numpy::NPY_INT64_: return out = DType::i64, true;
  case numpy::NPY_BOOL_: return out = DType::boolean, true;
  }
  return false;
}

bool on_a_card(dlpack::Device device) {
  return device.type == dlpack::cuda || device.type == dlpack::cuda_managed || device.type == dlpack::rocm;
}

// Where an array with __dlpack__ lies; on the CPU where it does not say.
dlpack::Device device_of(py::handle object) {
  if (!py::hasattr(object, "__dlpack_device__"))
    return {dlpack::cpu, 0};
  const auto [type, index] = object.attr("__dlpack_device__")().cast<std::pair<int32_t, int32_t>>();
  return {type, index};
}

constexpr const char *supported = "float32, float64, bfloat16, float16, int32, int64 or bool";

} // namespace

size_t Given::size() const { return object_ ? py::len(object_) : count_; }

Given Given::operator[](size_t i) const {
  if (!object_)
    return {arrays_ + i, 1};
  if (!PyList_Check(object_.ptr()))
    throw py::type_error(std::string("expected a list of arrays, got ") + Py_TYPE(object_.ptr())->tp_name);
  return py::handle(PyList_GetItem(object_.ptr(), static_cast<Py_ssize_t>(i)));
}

View::View(const char *name, Given given) : name_(name), object_(py::reinterpret_borrow<py::object>(given.object())) {
  if (!object_)
    static_cast<Memory &>(*this) = *given.memory();
  else if (!from_exchange_api(object_) && !from_numpy(object_) && !from_buffer(object_))
    from_protocol(object_);
}

View::~View() {
  if (buffer_.obj)
    PyBuffer_Release(&buffer_);
  if (managed_ && managed_->deleter)
    managed_->deleter(managed_);
  if (versioned_ && versioned_->deleter)
    versioned_->deleter(versioned_);
}

bool View::from_exchange_api(py::handle object) {
  const dlpack::Exchange *api = exchange_of(Py_TYPE(object.ptr()));
  if (!api || !api->tensor_from_object)
    return false;
  dlpack::Tensor tensor{};
  if (api->tensor_from_object(object.ptr(), &tensor))
    throw py::error_already_set();
  take(tensor);
  return true;
}

// A quarter of the time that the buffer protocol takes, for which NumPy writes down a format.
bool View::from_numpy(py::handle object) {
  if (!py::isinstance<py::array>(object))
    return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  const auto item = array.itemsize();
  if (array.ndim() > 8 || !dtype_from(array.dtype(), dtype))
    return false;
  data = const_cast<void *>(array.data());
  ndim = static_cast<int>(array.ndim());
  read_only = !array.writeable();
  for (int i = 0; i < ndim; ++i) {
    shape[i] = array.shape(i);
    if (array.strides(i) % item)
      throw py::value_error(std::string(name_) + ": expected strides that are multiples of the item size");
    stride[i] = array.strides(i) / item;
  }
  return true;
}

bool View::from_buffer(py::handle object) {
  if (!PyObject_CheckBuffer(object.ptr()))
    return false;
  if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDED_RO | PyBUF_FORMAT)) {
    PyErr_Clear();
    return false;
  }
  if (buffer_.ndim > 8 || !dtype_from(buffer_.format, buffer_.itemsize, dtype)) {
    PyBuffer_Release(&buffer_); // perhaps __dlpack__ knows the type; its error names it if not
    return false;
  }
  data = buffer_.buf;
  ndim = buffer_.ndim;
  read_only = buffer_.readonly;
  for (int i = 0; i < ndim; ++i) {
    shape[i] = buffer_.shape[i];
    if (buffer_.strides[i] % buffer_.itemsize)
      throw py::value_error(std::string(name_) + ": expected strides that are multiples of the item size");
    stride[i] = buffer_.strides[i] / buffer_.itemsize;
  }
  return true;
}

void View::from_protocol(py::handle object) {
  if (!py::hasattr(object, "__dlpack__"))
    throw py::type_error(std::string(name_) + ": expected an array (torch, NumPy, or anything with __dlpack__), got " +
                         Py_TYPE(object.ptr())->tp_name);
  py::dict options;
  if (const dlpack::Device where = device_of(object); on_a_card(where)) {
    // The producer makes its work come before ours, on the stream that we shall launch on: 1 is CUDA's name for the
    // default one, which other streams wait for. Nothing happens where that is the producer's own.
    const auto stream = reinterpret_cast<uintptr_t>(current_stream(object, where));
    options["stream"] = stream ? stream : 1;
  }
  py::object capsule;
  try {
    capsule = object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 1), **options);
  } catch (py::error_already_set &error) {
    if (!error.matches(PyExc_TypeError)) // producers from before DLPack 1.0 take no max_version
      throw;
    capsule = object.attr("__dlpack__")(**options);
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto *m = static_cast<dlpack::ManagedVersioned *>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (m->version.major != 1)
      throw py::buffer_error(std::string(name_) + ": unsupported DLPack major version");
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    versioned_ = m;
    read_only = m->flags & dlpack::read_only_flag;
    take(m->tensor);
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    managed_ = static_cast<dlpack::Managed *>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    take(managed_->tensor);
  } else {
    throw py::type_error(std::string(name_) + ": __dlpack__ returned no dltensor capsule");
  }
}

void View::take(const dlpack::Tensor &t) {
  if (t.ndim > 8)
    throw py::value_error(std::string(name_) + ": expected at most 8 dimensions, got " + std::to_string(t.ndim));
  if (!dtype_from(t.dtype, dtype))
    throw py::type_error(std::string(name_) + ": expected dtype " + supported + ", got DLPack type code " +
                         std::to_string(t.dtype.code) + " with " + std::to_string(t.dtype.bits) + " bits");
  ndim = t.ndim;
  device = t.device;
  if (device.type == dlpack::cuda_managed) // kernels see no difference
    device.type = dlpack::cuda;
  int64_t count = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    shape[i] = t.shape[i];
    stride[i] = t.strides ? t.strides[i] : count;
    count *= t.shape[i];
  }
  if (!t.data && count) // a fake or meta tensor: shapes without memory
    throw py::value_error(std::string(name_) + ": expected an array with memory, got one without (a fake tensor?)");
  data = static_cast<char *>(t.data) + t.byte_offset;
}

bool View::unit_inner_stride() const {
  return ndim == 0 || shape[ndim - 1] <= 1 || stride[ndim - 1] == 1 ||
         std::find(shape, shape + ndim, 0) != shape + ndim;
}

int64_t View::size() const {
  int64_t count = 1;
  for (int i = 0; i < ndim; ++i)
    count *= shape[i];
  return count;
}

bool View::contiguous() const {
  int64_t count = 1;
  for (int i = ndim - 1; i >= 0; count *= shape[i--])
    if (shape[i] > 1 && stride[i] != count)
      return size() == 0;
  return true;
}

std::string View::describe() const { return std::string(name_of(dtype)) + " " + shape_text(shape, ndim); }

void expect(bool ok, const char *name, const char *what, const View &got) {
  if (!ok)
    throw py::value_error(std::string(name) + ": expected " + what + ", got " + got.describe());
}

void expect_output(const char *name, const View &got, DType dtype, std::initializer_list<int64_t> shape) {
  const int ndim = static_cast<int>(shape.size());
  const bool ok = got.dtype == dtype && got.ndim == ndim && std::equal(shape.begin(), shape.end(), got.shape) &&
                  got.unit_inner_stride();
  if (!ok)
    expect(false, name,
           (std::string(name_of(dtype)) + " " + shape_text(shape.begin(), ndim) + " with inner stride 1").c_str(), got);
  if (got.read_only)
    throw py::value_error(std::string(name) + ": expected a writable array, got a read-only one");
}

void expect_dots(const char *name, const View &got, DType sums, int64_t samples, int64_t directions) {
  expect_output(name, got, sums, {samples, directions});
  expect(got.stride[0] == directions || samples <= 1 || directions == 0, name, "C-contiguous", got);
}

void expect_one_device(const char *op, const View &first, std::initializer_list<const View *> others) {
  for (const View *v : others)
    if (v)
      expect(v->device.type == first.device.type && v->device.index == first.device.index, op,
             "all arrays on one device", *v);
}

void *current_stream(py::handle object, dlpack::Device device) {
  const dlpack::Exchange *api = exchange_of(Py_TYPE(object.ptr()));
  if (api && api->current_stream) {
    void *stream = nullptr;
    if (api->current_stream(device.type, device.index, &stream))
      throw py::error_already_set();
    return stream;
  }
  if (!py::hasattr(object, "__cuda_array_interface__"))
    return nullptr;
  const py::dict interface = object.attr("__cuda_array_interface__");
  if (!interface.contains("stream") || interface["stream"].is_none())
    return nullptr;
  return reinterpret_cast<void *>(interface["stream"].cast<uintptr_t>()); // 1 and 2 are CUDA's names for default ones
}

} // namespace gg
