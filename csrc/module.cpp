// The extension module: one bind_<op> line per room. Links neither torch nor libpython.
#include "core/isa.h"
#include "core/parallel.h"
#if defined(GG_CUDA)
#include "core/cuda_workspace.h"
#endif
#include "include/ghostgram/ghostgram.h"
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace gg {
void bind_roofs(py::module_ &cpu, py::module_ &cuda);
void bind_roots(py::module_ &cpu, py::module_ &cuda);
void bind_grad_stats(py::module_ &cpu, py::module_ &cuda);
void bind_grad_gram(py::module_ &cpu, py::module_ &cuda);
void bind_embedding_stats(py::module_ &cpu, py::module_ &cuda);
void bind_affine_stats(py::module_ &cpu, py::module_ &cuda);
void bind_gumbel_topk(py::module_ &cpu, py::module_ &cuda);
void bind_grad_project(py::module_ &cpu, py::module_ &cuda);
void bind_softmax_stats(py::module_ &cpu, py::module_ &cuda);
void bind_trajectory_match(py::module_ &cpu, py::module_ &cuda);
void bind_adam_dots(py::module_ &cpu, py::module_ &cuda);
} // namespace gg

PYBIND11_MODULE(_C, m) {
  py::module_ cpu = m.def_submodule("cpu"), cuda = m.def_submodule("cuda");
  m.attr("cuda_state") = ghostgram_cuda_state();
#if defined(GG_CUDA)
  cuda.def("device_count", &gg::cuda_device_count);
#endif
  m.def("isa", &gg::isa_name);
  m.attr("isas") = py::make_tuple(GHOSTGRAM_ISAS);
  m.def("borrow_openmp", &gg::borrow_openmp);
  m.def("num_threads", &gg::num_threads);
  m.def("set_num_threads", &gg::set_num_threads);
  gg::bind_roofs(cpu, cuda);
  gg::bind_roots(cpu, cuda);
  gg::bind_grad_stats(cpu, cuda);
  gg::bind_grad_gram(cpu, cuda);
  gg::bind_embedding_stats(cpu, cuda);
  gg::bind_affine_stats(cpu, cuda);
  gg::bind_gumbel_topk(cpu, cuda);
  gg::bind_grad_project(cpu, cuda);
  gg::bind_softmax_stats(cpu, cuda);
  gg::bind_trajectory_match(cpu, cuda);
  gg::bind_adam_dots(cpu, cuda);
}
