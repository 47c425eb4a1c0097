// The border of CUDA kernels (core/view, core/cuda_device, core/cuda_workspace) as a module of its own, on a card that
// is not there (cuda_runtime_api.h beside this file), with arrays that only claim to lie on it.
#include "core/bind.h"
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

// A room whose kernel writes down the address of its input, how many samples it was called with, and an option.
struct Probe {
  int64_t address, samples, option;
  int64_t *out;

  double work() const { return 0; }
};

struct Call {
  static constexpr const char *op = "probe";
  static constexpr size_t arrays = 3;
  using Options = std::tuple<int64_t>;

  View x, out;
  Probe args{};

  const View &place() const { return x; }
  static bool per_sample(size_t argument, int) { return argument == 0; }

  Call(Given x_, Given nothing, Given out_, int64_t option) : x("x", x_), out("out", out_) {
    expect(nothing.is_none() && x.ndim == 2 && x.contiguous(), "x", "a contiguous matrix", x);
    expect_output("out", out, DType::i64, {3});
    args = {int64_t(reinterpret_cast<uintptr_t>(x.data)), x.shape[0], option, static_cast<int64_t *>(out.data)};
  }
  void check_results() const {
    if (args.option < 0)
      throw py::value_error("option: expected at least 0, got " + std::to_string(args.option));
  }
};

void probe(const Probe &p) { p.out[0] = p.address, p.out[1] = p.samples, p.out[2] = p.option; }

int64_t probe_workspace(const Probe &p) { return 100 + p.samples; }

int probe_on_card(const Probe &p, void *workspace, void *stream) {
  border::events.push_back("launch in " + std::to_string(uintptr_t(workspace)) + " on " +
                           std::to_string(uintptr_t(stream)));
  if (p.option == 0)
    probe(p);
  return border::last_error = int(p.option);
}

// XLA as a handler of a card sees it: calls one with a batch of `calls` matrices (2, 3), and returns the message of its
// error, the results, and what was asked of XLA and of the card.
py::tuple call_of_xla(py::capsule handler, int64_t calls, int64_t option, bool has_memory) {
  using namespace xla;
  static std::string message;
  message.clear();
  border::events.clear();
  Api api{};
  api.error_create = [](ErrorCreate *request) {
    message = request->message;
    return reinterpret_cast<Error *>(&message);
  };
  api.stream_get = [](StreamGet *request) {
    request->stream = reinterpret_cast<void *>(7);
    return static_cast<Error *>(nullptr);
  };
  api.allocate = [](Allocate *request) {
    if (!request->context)
      return reinterpret_cast<Error *>(&(message = "no memory"));
    request->data = reinterpret_cast<void *>(4096);
    border::events.push_back("allocate " + std::to_string(request->bytes));
    return static_cast<Error *>(nullptr);
  };
  api.free = [](Free *request) {
    border::events.push_back("free " + std::to_string(request->bytes));
    return static_cast<Error *>(nullptr);
  };
  std::vector<float> x(calls * 6);
  std::vector<int64_t> out(calls * 3);
  int64_t x_shape[] = {calls, 2, 3}, out_shape[] = {calls, 3}, rank = 2;
  Buffer input{sizeof(Buffer), nullptr, f32, x.data(), 3, x_shape};
  Buffer result{sizeof(Buffer), nullptr, s64, out.data(), 2, out_shape};
  Buffer *inputs[] = {&input}, *results[] = {&result};
  Text layout{"i,,o", 4}, names[] = {{"layout", 6}, {"o0", 2}, {"rank", 4}},
                          *name_pointers[] = {names, names + 1, names + 2};
  Scalar option_value{s64, &option}, rank_value{s64, &rank};
  int32_t types[] = {text, scalar, scalar};
  void *values[] = {&layout, &option_value, &rank_value};
  CallFrame frame{};
  frame.api = &api;
  frame.context = has_memory ? reinterpret_cast<Context *>(&api) : nullptr;
  frame.inputs = {sizeof(Buffers), nullptr, 1, nullptr, inputs};
  frame.results = {sizeof(Buffers), nullptr, 1, nullptr, results};
  frame.attributes = {sizeof(Attributes), nullptr, 3, types, name_pointers, values};
  reinterpret_cast<Handler *>(static_cast<void *>(handler.get_pointer()))(&frame);
  py::list found, events;
  for (int64_t value : out)
    found.append(value);
  for (const std::string &event : border::events)
    events.append(event);
  return py::make_tuple(message, found, events);
}

// The version of the interface that a handler answers with, to an XLA of this one; -1 is one that does not say.
std::pair<int, int> version_for(py::capsule handler, int minor) {
  using namespace xla;
  Api api{};
  api.version.minor = minor;
  Metadata metadata{};
  MetadataExtension question{{sizeof(MetadataExtension), 1, nullptr}, &metadata};
  CallFrame frame{};
  frame.extensions = &question.base;
  frame.api = minor < 0 ? nullptr : &api;
  reinterpret_cast<Handler *>(static_cast<void *>(handler.get_pointer()))(&frame);
  return {metadata.version.major, metadata.version.minor};
}

} // namespace
} // namespace gg

namespace py = pybind11;

PYBIND11_MODULE(border, m) {
  m.def("capsule", &gg::capsule);
  m.def("exchange", [] { return py::capsule(gg::exchange(), "dlpack_exchange_api"); });
  m.def("call_of_xla", &gg::call_of_xla);
  m.def("version_for", &gg::version_for);
  py::module_ cpu = m.def_submodule("cpu"), cuda = m.def_submodule("cuda");
  gg::Room<gg::Call>::bind_cpu<gg::probe>(cpu);
  gg::Room<gg::Call>::bind_cuda<gg::probe_on_card, gg::probe_workspace>(cuda);
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
