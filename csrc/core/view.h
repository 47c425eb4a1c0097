// Borrowing arrays from Python: torch by the DLPack C exchange API, NumPy by the buffer protocol, everything else by
// __dlpack__. The only header of core/ that knows Python. A View holds what it borrowed until it dies; create and
// destroy it with the GIL held, read its fields without.
#pragma once
#include "core/array.h"
#include "core/dlpack.h"
#include <initializer_list>
#include <pybind11/pybind11.h>
#include <string>

namespace gg {

namespace py = pybind11;

struct View {
  void *data = nullptr;
  DType dtype{};
  int ndim = 0;
  int64_t shape[8]{}, stride[8]{}; // in elements
  dlpack::Device device{dlpack::cpu, 0};
  bool read_only = false;

  View(const View &) = delete;
  View &operator=(const View &) = delete;
  View(const char *name, py::handle object);
  ~View();

  // Whether elements along the last axis are neighbours in memory; true where there is at most one.
  bool unit_inner_stride() const;
  bool contiguous() const;      // in the order of C
  int64_t size() const;         // elements
  std::string describe() const; // "float32 (8, 256, 768)"

private:
  bool from_exchange_api(py::handle object);
  bool from_buffer(py::handle object);
  void from_protocol(py::handle object);
  void take(const dlpack::Tensor &tensor);

  const char *name_;
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
