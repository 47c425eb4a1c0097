// core/cuda_device.cpp and core/cuda_workspace.cpp for the card of simt.h, whose memory is the CPU's: kernels are
// called as they are on a device.
#include "core/cuda_workspace.h"
#include "simt.h"
#include <cstring>

namespace gg {

static char stream; // only its address matters

int cuda_device_count() { return 1; }

const char *cuda_failure(int device, const std::function<int()> &launch) {
  simt::settings.stream = device < 0 ? nullptr : &stream; // C's doors are tried on the default one
  simt::settings.error.clear();
  const int status = launch();
  if (simt::settings.error.empty() && status) // whether or not the launcher has looked
    simt::settings.error = "CUDA error " + std::to_string(status);
  return simt::settings.error.empty() ? nullptr : simt::settings.error.c_str();
}

static void launched(const char *op, const char *failure) {
  if (failure)
    throw std::runtime_error(std::string(op) + ": " + failure);
}

void run_on_device(const char *op, py::handle, const View &, py::handle workspace, int64_t bytes,
                   const std::function<int(void *, void *)> &launch) {
  const View scratch("workspace", workspace);
  expect(scratch.ndim == 1 && scratch.shape[0] * size_of(scratch.dtype) >= bytes, "workspace", "enough bytes", scratch);
  launched(op, cuda_failure(0, [&] { return launch(scratch.data, &stream); }));
}

void run_on_stream(const char *op, const std::function<int()> &launch) { launched(op, cuda_failure(-1, launch)); }

void fill_with_ones(void *data, int64_t bytes, void *) { std::memset(data, 0xff, bytes); }

} // namespace gg
