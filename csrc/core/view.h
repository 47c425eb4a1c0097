// Borrowing arrays from Python: torch by the DLPack C exchange API, NumPy by its arrays' struct, whose layout is part
// of NumPy's binary interface, and everything else by the buffer protocol or by __dlpack__. A View holds what it
// borrowed until it dies; create and destroy it with the GIL held, read its fields without. A View of XLA's memory
// (core/bind.h) needs no GIL at all.
#pragma once
#include "core/array.h"
#include "core/dlpack.h"
#include <initializer_list>
#include <pybind11/pybind11.h>
#include <string>

namespace gg {

namespace py = pybind11;

struct Memory {
  void *data = nullptr;
  DType dtype{};
  int ndim = 0;
  int64_t shape[8]{}, stride[8]{}; // in elements
  dlpack::Device device{dlpack::cpu, 0};
  bool read_only = false;
};

// An argument of a room as it came in, from Python or from XLA: an array, a list of them, or nothing. Holds nothing.
class Given {
public:
  Given(py::handle object) : object_(object) {}
  Given(const Memory *arrays, size_t count) : arrays_(arrays), count_(count) {}

  bool is_none() const { return object_ ? object_.is_none() : count_ == 0; }
  size_t size() const; // of a list
  Given operator[](size_t i) const;
  py::handle object() const { return object_; } // null where it is not from Python
  const Memory *memory() const { return arrays_; }

private:
  py::handle object_;
  const Memory *arrays_ = nullptr;
  size_t count_ = 0;
};

struct View : Memory {
  View(const View &) = delete;
  View &operator=(const View &) = delete;
  View(const char *name, Given given);
  ~View();

  const char *name() const { return name_; }
  py::handle object() const { return object_; } // null where it is not from Python

  // Whether elements along the last axis are neighbours in memory; true where there is at most one.
  bool unit_inner_stride() const;
  bool contiguous() const;      // in the order of C
  int64_t size() const;         // elements
  std::string describe() const; // "float32 (8, 256, 768)"

private:
  bool from_exchange_api(py::handle object);
  bool from_numpy(py::handle object);
  bool from_buffer(py::handle object);
  void from_protocol(py::handle object);
  void take(const dlpack::Tensor &tensor);

  const char *name_;
  py::object object_; // a caller's list may lose it while a kernel runs
  Py_buffer buffer_{};
  dlpack::Managed *managed_ = nullptr;
  dlpack::ManagedVersioned *versioned_ = nullptr;
};

// Throws ValueError "<name>: expected <what>, got <dtype (shape)>" unless `ok`.
void expect(bool ok, const char *name, const char *what, const View &got);

// An output: of exactly this type and shape, unit inner stride (the row stride of a matrix is free), writable.
void expect_output(const char *name, const View &got, DType dtype, std::initializer_list<int64_t> shape);

// The dots of an op: samples x directions in the dtype of its sums, C-contiguous.
void expect_dots(const char *name, const View &got, DType sums, int64_t samples, int64_t directions);

// Throws ValueError that names the op unless every array lies where `first` does; null stands for an absent one.
void expect_one_device(const char *op, const View &first, std::initializer_list<const View *> others);

// The caller's current stream on that device: what the exchange API of `object`'s type says, or else the stream of its
// __cuda_array_interface__ (for CuPy the current one too); null, the default stream, where there is neither.
void *current_stream(py::handle object, dlpack::Device device);

} // namespace gg
