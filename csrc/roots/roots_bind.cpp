// Norms from their squares, in place: a framework's own operations for it take longer than a small kernel.
#include "core/view.h"

#include <cmath>

namespace gg {
namespace {

template <class T> void take_roots(T *x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    x[i] = x[i] < 0 ? 0 : std::sqrt(x[i]); // rounding may have left a square that should be 0 a little below it
}

} // namespace

void bind_roots(py::module_ &cpu, py::module_ &) {
  cpu.def("roots", [](py::handle squares) {
    const View x("squares", squares);
    expect(x.device.type == dlpack::cpu && x.contiguous() && !x.read_only, "squares", "writable, contiguous CPU memory",
           x);
    expect(x.dtype == DType::f32 || x.dtype == DType::f64, "squares", "float32 or float64", x);
    x.dtype == DType::f32 ? take_roots(static_cast<float *>(x.data), x.size())
                          : take_roots(static_cast<double *>(x.data), x.size());
  });
}

} // namespace gg
