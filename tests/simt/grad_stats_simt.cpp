// The CUDA source of grad_stats as a CPU library for ctypes.
#include "grad_stats/grad_stats_cuda.cu"

extern "C" {
int64_t simt_grad_stats_workspace(const gg::GradStats *args) { return gg::grad_stats_cuda_workspace(*args); }
int simt_grad_stats(const gg::GradStats *args, void *workspace) {
  return gg::grad_stats_cuda(*args, workspace, nullptr);
}
}
