// grad_stats: everything one wants of the per-sample gradients of a linear layer, from one pass over their tiles.
//
//   G_i            = sum_t b_it a_it^T                (p, d)   formed tile by tile, used, forgotten
//   weight_grad    = sum_i G_i                        (p, d)   written, or added to when `accumulate`
//   norms2_i       = ||G_i||_F^2                      (B)
//   dots_ik        = <G_i, D_k>                       (B, K)
//
// a (B,T,d) and b (B,T,p) share one dtype: f32, bf16, f16 or f64; D (K,p,d) has the accumulator's dtype or that of
// a and b. Products and sums are float32 (float64 for f64 inputs), and so are the three outputs. Partial sums over
// tiles are added in float64 in an order that depends on the shapes alone: the same bits for any number of threads.
// Sizes of 0 are legal and give zeros (an untouched weight_grad when `accumulate`). Outputs must not overlap inputs.
#pragma once
#include "core/array.h"

namespace gg {

struct GradStats {
  DType dtype;                               // of a and b
  DType direction_dtype;                     // of D
  int64_t samples, tokens, d, p, directions; // B, T, d, p, K

  const void *a; // inner stride 1, like b and D; all strides count elements
  int64_t a_sample, a_token;
  const void *b;
  int64_t b_sample, b_token;
  const void *D; // null when directions == 0
  int64_t D_direction, D_row;

  void *weight_grad; // null: not wanted
  int64_t weight_grad_row;
  bool accumulate;
  void *norms2; // null: not wanted; contiguous
  void *dots;   // null when directions == 0; contiguous

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const { return (tokens + 1.0 + directions) * samples * d * p; }
};

GG_LENT void grad_stats_cpu(const GradStats &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes that grad_stats_cuda_workspace asks for. Returns a cudaError_t.
GG_LENT int64_t grad_stats_cuda_workspace(const GradStats &);
GG_LENT int grad_stats_cuda(const GradStats &, void *workspace, void *stream);

} // namespace gg
