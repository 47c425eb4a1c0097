#include "core/isa.h"
#include "core/view.h"
#include "roofs/roofs.h"

GG_PER_ISA(roofs, Roofs)

namespace gg {

static DType dtype_named(const std::string &name) {
  for (DType t : {DType::f32, DType::f64, DType::bf16, DType::f16})
    if (name == name_of(t))
      return t;
  throw py::value_error("dtype: expected float32, float64, bfloat16 or float16, got " + name);
}

void bind_roofs(py::module_ &cpu, py::module_ &) {
  cpu.def(
      "roofs",
      [](py::handle memory, double seconds, const std::string &dtype) {
        View m("memory", memory);
        expect(m.dtype == DType::f32 && m.ndim == 1 && m.stride[0] == 1 && !m.read_only, "memory",
               "a writable contiguous float32 (n,)", m);
        double flops, read, copy, triad;
        Roofs args{
            dtype_named(dtype), seconds, static_cast<float *>(m.data), m.shape[0] * 4, &flops, &read, &copy, &triad};
        {
          py::gil_scoped_release free;
          roofs_cpu(args);
        }
        return py::make_tuple(flops, read, copy, triad);
      },
      py::arg("memory"), py::arg("seconds"), py::arg("dtype") = "float32");
}

} // namespace gg
