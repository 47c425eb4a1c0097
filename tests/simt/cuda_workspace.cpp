// core/cuda_workspace.cpp for the card of simt.h, whose memory is the CPU's: kernels are called as they are on a
// device.
#include "core/cuda_workspace.h"
#include "simt.h"
#include <cstring>

namespace gg {

int cuda_device_count() { return 1; }

void run_on_device(const char *op, py::handle, const View &, py::handle workspace, int64_t bytes,
                   const std::function<int(void *, void *)> &launch) {
  const View scratch("workspace", workspace);
  expect(scratch.ndim == 1 && scratch.shape[0] * size_of(scratch.dtype) >= bytes, "workspace", "enough bytes", scratch);
  static char stream; // only its address matters
  simt::settings.stream = &stream;
  run_on_stream(op, [&] { return launch(scratch.data, &stream); });
}

void run_on_stream(const char *op, const std::function<int()> &launch) {
  simt::settings.error.clear();
  const int status = launch();
  if (!simt::settings.error.empty()) // whether or not the launcher has looked
    throw std::runtime_error(std::string(op) + ": " + simt::settings.error);
  if (status)
    throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(status));
}

void fill_with_ones(void *data, int64_t bytes, void *) { std::memset(data, 0xff, bytes); }

} // namespace gg
