#include "core/cuda_workspace.h"

namespace gg {

static void launched(const char *op, const char *failure) {
  if (failure)
    throw std::runtime_error(std::string(op) + ": " + failure);
}

void run_on_device(const char *op, py::handle a, const View &a_view, py::handle workspace, int64_t bytes,
                   const std::function<int(void *, void *)> &launch) {
  expect(a_view.device.type == dlpack::cuda, "a", "CUDA memory", a_view);
  const View scratch("workspace", workspace);
  expect(scratch.ndim == 1 && (scratch.shape[0] <= 1 || scratch.stride[0] == 1), "workspace", "a contiguous vector",
         scratch);
  expect(scratch.device.type == a_view.device.type && scratch.device.index == a_view.device.index, "workspace",
         "memory on the device of a", scratch);
  const std::string enough = "at least " + std::to_string(bytes) + " bytes";
  expect(scratch.shape[0] * size_of(scratch.dtype) >= bytes, "workspace", enough.c_str(), scratch);

  expect(reinterpret_cast<uintptr_t>(scratch.data) % 16 == 0, "workspace", "an address that is a multiple of 16",
         scratch);

  void *stream = current_stream(a, a_view.device);
  py::gil_scoped_release free;
  launched(op, cuda_failure(a_view.device.index, [&] { return launch(scratch.data, stream); }));
}

void run_on_stream(const char *op, const std::function<int()> &launch) { launched(op, cuda_failure(-1, launch)); }

void fill_with_ones(void *data, int64_t bytes, void *stream) {
  launched("fill", cuda_failure(-1, [&] { return cuda_fill(data, 0xff, bytes, stream); }));
}

} // namespace gg
