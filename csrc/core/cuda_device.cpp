#include "core/cuda_device.h"

#include <cuda_runtime_api.h>

namespace gg {
namespace {

// Makes a device current, and the one before it when it dies. CUDA keeps the current device per thread.
class CurrentDevice {
public:
  explicit CurrentDevice(int device) : status(device < 0 ? cudaSuccess : cudaGetDevice(&before_)) {
    changed_ = status == cudaSuccess && device >= 0 && before_ != device;
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

const char *cuda_failure(int device, const std::function<int()> &launch) {
  const CurrentDevice current(device);
  const cudaError_t status = current.status == cudaSuccess ? static_cast<cudaError_t>(launch()) : current.status;
  if (status == cudaSuccess)
    return nullptr;
  cudaGetLastError(); // or the caller's next CUDA call would report it again
  return cudaGetErrorString(status);
}

int cuda_fill(void *data, int value, int64_t bytes, void *stream) {
  return bytes ? cudaMemsetAsync(data, value, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream))
               : cudaSuccess;
}

} // namespace gg
