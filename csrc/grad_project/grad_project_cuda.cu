// grad_project on tensor cores, by kind of projection. See docs/gpu/grad_project.md.
#include "grad_project/grad_project.h"
#include "grad_project/grad_project_kronecker.cuh"
#include "grad_project/grad_project_sparse.cuh"

namespace gg {
namespace {

template <class In> cudaError_t run(const GradProject &s, char *workspace, void *stream) {
  return s.kind == GradProject::Kind::sparse ? run_sparse<In>(s, workspace, stream)
                                             : run_kronecker<In>(s, workspace, stream);
}

int64_t results_of(const GradProject &s) {
  return s.samples * (s.kind == GradProject::Kind::sparse ? s.buckets : s.k_out * s.k_in);
}

bool is_empty(const GradProject &s) { return !s.tokens || !s.d || !s.p; }

} // namespace

int64_t grad_project_cuda_workspace(const GradProject &s) {
  if (!results_of(s) || is_empty(s))
    return 0;
  int64_t bytes = 0;
  if (s.kind == GradProject::Kind::sparse)
    plan_sparse(s, nullptr, bytes);
  else
    plan_kronecker(s, nullptr, bytes);
  return bytes;
}

int grad_project_cuda(const GradProject &s, void *workspace, void *stream) {
  if (s.dtype == DType::f64)
    return cudaErrorNotSupported;
  const int64_t results = results_of(s);
  if (!results)
    return cudaSuccess;
  if (is_empty(s))
    return zero(s.out, results * 4, stream);
  char *scratch = static_cast<char *>(workspace);
  if (s.dtype == DType::f32)
    return run<float>(s, scratch, stream);
  return s.dtype == DType::bf16 ? run<bf16>(s, scratch, stream) : run<f16>(s, scratch, stream);
}

} // namespace gg
