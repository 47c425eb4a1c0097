// Rows read 16 bytes per thread: which neighbouring columns a thread owns, and how they come into registers.
#pragma once
#include "core/device.cuh"

namespace gg {

// What one 16-byte load brings.
template <class T> constexpr int width = 16 / int(sizeof(T));

template <class T> using sum_of = typename accumulator<T>::type;

// `n` neighbours, those beyond `left` being 0; `whole`: all are there, and aligned.
template <bool whole, class T, int n>
__device__ __forceinline__ void load_columns(const T *from, int left, sum_of<T> (&x)[n]) {
  if constexpr (whole) {
    sum_of<T> part[width<T>];
#pragma unroll
    for (int first = 0; first < n; first += width<T>) {
      load_16(from + first, part);
#pragma unroll
      for (int j = 0; j < width<T>; ++j)
        x[first + j] = part[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j)
      x[j] = j < left ? widen(from[j]) : 0;
  }
}

// Whether every row of an array with these strides, counted in elements, begins at a multiple of 16 bytes.
inline bool allows_16(const void *data, int64_t stride, int64_t other_stride, int64_t element) {
  return (int64_t(reinterpret_cast<uintptr_t>(data)) | stride * element | other_stride * element) % 16 == 0;
}

} // namespace gg
