// The border of CUDA kernels: from arrays of Python to a device, a stream and scratch memory. Includes no CUDA header,
// so that binding code compiles without one.
#pragma once
#include "core/cuda_device.h"
#include "core/view.h"

namespace gg {

// Throws ValueError for float64: what rooms say that multiply on tensor cores alone.
inline void refuse_float64(DType dtype) {
  if (dtype == DType::f64)
    throw py::value_error("cuda: float64 is not supported; use backend='cpu'");
}

// Calls launch(scratch, stream) with a's device current and the GIL released: `scratch` is the memory of `workspace`, a
// vector of at least `bytes` bytes on that device, and `stream` the caller's current one. A cudaError_t other than
// success becomes RuntimeError "<op>: <what CUDA says>". `a_view` is the View of `a`.
void run_on_device(const char *op, py::handle a, const View &a_view, py::handle workspace, int64_t bytes,
                   const std::function<int(void *scratch, void *stream)> &launch);

// The same for a caller whose device is current and who has a stream and scratch memory.
void run_on_stream(const char *op, const std::function<int()> &launch);

// Sets every bit, which is NaN in every floating format, behind what is on the stream.
void fill_with_ones(void *data, int64_t bytes, void *stream);

} // namespace gg
