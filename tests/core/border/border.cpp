// The border of CUDA kernels (core/view, core/cuda_device, core/cuda_workspace) as a module of its own, on a card that
// is not there (cuda_runtime_api.h beside this file), with arrays that only claim to lie on it.
#include "core/cuda_device.cpp"
#include "core/cuda_workspace.cpp"

#include <memory>

namespace gg {
namespace {

// A "dltensor" capsule of one float32 vector: of a memory that nobody touches.
py::capsule capsule(uintptr_t address, int64_t count, int type, int index) {
  struct Owned {
    dlpack::Managed managed{};
    int64_t shape;
  };
  auto *owned = new Owned;
  owned->shape = count;
  owned->managed.tensor = {
      reinterpret_cast<void *>(address), {type, index}, 1, {dlpack::ieee_float, 32, 1}, &owned->shape, nullptr, 0};
  owned->managed.context = owned;
  owned->managed.deleter = [](dlpack::Managed *m) { delete static_cast<Owned *>(m->context); };
  return py::capsule(&owned->managed, "dltensor", [](PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor"))
      if (auto *m = static_cast<dlpack::Managed *>(PyCapsule_GetPointer(capsule, "dltensor")))
        m->deleter(m);
  });
}

// The exchange API of a framework whose arrays have `address`, `count` and `device` and whose current stream on device
// i is 1000 + i.
const dlpack::Exchange *exchange() {
  static int64_t shape;
  static dlpack::Exchange api{};
  api.header.version = {1, 3};
  api.tensor_from_object = [](void *object, dlpack::Tensor *out) {
    const py::handle array(static_cast<PyObject *>(object));
    shape = array.attr("count").cast<int64_t>();
    *out = {reinterpret_cast<void *>(array.attr("address").cast<uintptr_t>()),
            {dlpack::cuda, array.attr("device").cast<int32_t>()},
            1,
            {dlpack::ieee_float, 32, 1},
            &shape,
            nullptr,
            0};
    return 0;
  };
  api.current_stream = [](int32_t type, int32_t index, void **stream) {
    if (type != dlpack::cuda) {
      PyErr_SetString(PyExc_ValueError, "no stream there");
      return -1;
    }
    *stream = reinterpret_cast<void *>(uintptr_t(1000 + index));
    return 0;
  };
  return &api;
}

} // namespace
} // namespace gg

namespace py = pybind11;

PYBIND11_MODULE(border, m) {
  m.def("capsule", &gg::capsule);
  m.def("exchange", [] { return py::capsule(gg::exchange(), "dlpack_exchange_api"); });
  m.def("device_count", &gg::cuda_device_count);
  m.def("card", [](int devices, int current) {
    border::devices = devices, border::current = current, border::last_error = 0;
    border::made_current.clear();
  });
  m.def("state", [] {
    py::list made_current;
    for (int device : border::made_current)
      made_current.append(device);
    return py::make_tuple(border::current, made_current, border::last_error);
  });
  // What a launch sees: its scratch, its stream, the current device, and whether the GIL is held.
  m.def("run", [](py::handle a, py::handle workspace, int64_t bytes, int status) {
    const gg::View view("a", a);
    uintptr_t scratch = 0, stream = 0;
    int device = -1, gil = -1;
    gg::run_on_device("op", a, view, workspace, bytes, [&](void *scratch_, void *stream_) {
      scratch = reinterpret_cast<uintptr_t>(scratch_), stream = reinterpret_cast<uintptr_t>(stream_);
      device = border::current, gil = PyGILState_Check();
      return border::last_error = status;
    });
    return py::make_tuple(scratch, stream, device, gil);
  });
}
