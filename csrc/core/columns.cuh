// Rows read 16 bytes per thread: which neighbouring columns a thread owns, and how they come into registers.
#pragma once
#include "core/device.cuh"

namespace gg {

template <class T> using sum_of = typename accumulator<T>::type;

// `n` neighbours, those beyond `left` being 0; `whole`: all are there, and aligned. What is read `once` leaves the
// caches first.
template <bool whole, bool once = false, class T, int n>
__device__ __forceinline__ void load_columns(const T *from, int left, sum_of<T> (&x)[n]) {
  if constexpr (whole) {
#pragma unroll
    for (int first = 0; first < n; first += Vector<T>::size) {
      const Vector<T> part = once ? load_vector_once(from + first) : load_vector(from + first);
#pragma unroll
      for (int j = 0; j < Vector<T>::size; ++j)
        x[first + j] = widen(part.at[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j)
      x[j] = j < left ? widen(from[j]) : 0;
  }
}

} // namespace gg
