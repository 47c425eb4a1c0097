#include "core/cuda_workspace.h"

#include <cuda_runtime_api.h>

namespace gg {
namespace {

// Makes a device current, and the one before it when it dies. CUDA keeps the current device per thread.
class CurrentDevice {
public:
  explicit CurrentDevice(int device) : status(cudaGetDevice(&before_)) {
    changed_ = status == cudaSuccess && before_ != device;
    if (changed_)
      status = cudaSetDevice(device);
  }
  ~CurrentDevice() {
    if (changed_)
      cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice &) = delete;
  CurrentDevice &operator=(const CurrentDevice &) = delete;

  cudaError_t status;

private:
  int before_ = 0;
  bool changed_ = false;
};

} // namespace

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess)
    return count;
  cudaGetLastError(); // or the caller's next CUDA call would report ours
  return 0;
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
  const CurrentDevice device(a_view.device.index);
  run_on_stream(op, [&] { return device.status == cudaSuccess ? launch(scratch.data, stream) : device.status; });
}

void run_on_stream(const char *op, const std::function<int()> &launch) {
  const auto status = static_cast<cudaError_t>(launch());
  if (status == cudaSuccess)
    return;
  cudaGetLastError(); // or the caller's next CUDA call would report it again
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

void fill_with_ones(void *data, int64_t bytes, void *stream) {
  if (bytes)
    run_on_stream("fill", [&] {
      return cudaMemsetAsync(data, 0xff, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
    });
}

} // namespace gg
