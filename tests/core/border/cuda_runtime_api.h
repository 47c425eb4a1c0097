// What csrc/core/cuda_workspace.cpp calls of CUDA, answered by a card that is not there: it notes what it is asked.
#pragma once
#include <cstring>
#include <string>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoDevice = 100,
  cudaErrorLaunchFailure = 719
};

namespace border {
inline int devices = 4, current = 0, last_error = 0;
inline std::vector<int> made_current;
inline std::vector<std::string> events; // what was asked of the card, in order
} // namespace border

using cudaStream_t = struct Stream *;

inline cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t stream) {
  std::memset(data, value, bytes); // the memory is the CPU's
  border::events.push_back("fill " + std::to_string(bytes) + " on " + std::to_string(uintptr_t(stream)));
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int *count) {
  *count = border::devices;
  return border::devices ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaGetDevice(int *device) {
  *device = border::current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  border::made_current.push_back(device);
  if (device >= border::devices)
    return cudaError_t(border::last_error = cudaErrorInvalidDevice);
  border::current = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaError_t(border::last_error);
  border::last_error = 0;
  return error;
}
using cudaStream_t = void *;
inline cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t) { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device" : error == cudaErrorLaunchFailure ? "it failed" : "other";
}
