// What launchers do on the host before a kernel runs: how wide an operand may be read, and which instantiation it is.
#pragma once
#include "core/device.cuh"

namespace gg {

// The widest of 16 bytes, 4 bytes and one element that every row of an array with these strides, counted in elements,
// begins at a multiple of.
inline int copy_bytes(const void *data, int64_t stride, int64_t other_stride, int64_t element) {
  const int64_t misalignment = int64_t(reinterpret_cast<uintptr_t>(data)) | stride * element | other_stride * element;
  return int(misalignment % 16 == 0 ? 16 : misalignment % 4 == 0 ? 4 : element);
}

inline bool allows_16(const void *data, int64_t stride, int64_t other_stride, int64_t element) {
  return copy_bytes(data, stride, other_stride, element) == 16;
}

// An output that is not wanted is null.
inline cudaError_t zero(void *to, int64_t bytes, void *stream) {
  return to && bytes ? cudaMemsetAsync(to, 0, size_t(bytes), static_cast<cudaStream_t>(stream)) : cudaSuccess;
}

// run(element) with an element of the type that a floating dtype names.
template <class Run> cudaError_t by_dtype(DType dtype, Run run) {
  switch (dtype) {
  case DType::f32: return run(float{});
  case DType::f64: return run(double{});
  case DType::bf16: return run(bf16{});
  default: return run(f16{});
  }
}

} // namespace gg
