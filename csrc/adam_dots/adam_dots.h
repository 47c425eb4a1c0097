// adam_dots: what a reference's loss would change by, to first order, if AdamW took one more step on one sample alone.
//
//   g_i    = c_i sum_t b_it a_it^T                      (p, d)   formed tile by tile, used, forgotten
//   d_i    = step(g_i) - step(0)                        (p, d)   the same
//   out_ir = <D_r, d_i>                                 (B, R)
//
// where step(g) = -eta (m' / bc1) / (sqrt(v' / bc2) + eps) elementwise, with m' = beta1 m + (1 - beta1) g and
// v' = beta2 v + (1 - beta2) g^2; weight decay is in both steps and drops out. The difference is computed without
// cancellation (core/adam_step.h), so it keeps its digits where g is small beside m and v; where g = 0 it is 0.
//
// a (B,T,d) and b (B,T,p) share one dtype: f32, bf16, f16 or f64; m and v (p,d) share one, and so do the D (R,p,d):
// each that of a and b, or that of the sums, which is float32 (float64 for f64). clip (B) and out have the dtype of the
// sums. v >= 0; 0 < eps <= 1; 0 <= beta1, beta2 < 1; bc1 = 1 - beta1^n and bc2 = 1 - beta2^n where the step would be
// the n-th. m / eps must be in range; g may be of any size that is.
//
// Partial sums over tiles are added in float64 in an order that depends on the shapes alone: the same bits for any
// number of threads. Sizes of 0 are legal and give zeros. `out` must not overlap inputs.
//
// The step is not linear in g, so what belongs to one weight must be summed before it: a weight that a model uses
// several times takes all uses at once, one after the other along T. Gradients g (B,n) that are already formed, of a
// bias or a normalisation's scale, are a call with T = p = 1: a = g as (B,1,n), b = ones (B,1,1), and m, v, D_r as
// (1,n).
#pragma once
#include "core/array.h"

namespace gg {

struct AdamDots {
  DType dtype;                               // of a and b
  DType moment_dtype, direction_dtype;       // of m and v, of D
  int64_t samples, tokens, d, p, directions; // B, T, d, p, R

  const void *a; // inner stride 1, like b, m, v and D; all strides count elements
  int64_t a_sample, a_token;
  const void *b;
  int64_t b_sample, b_token;
  const void *clip; // contiguous
  const void *m, *v;
  int64_t m_row, v_row;
  const void *D;
  int64_t D_direction, D_row;

  double eta, beta1, beta2, eps, bc1, bc2;

  void *out; // contiguous

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const { return (tokens + 10.0 + directions) * samples * d * p; } // ten for the step of an element
};

GG_LENT void adam_dots_cpu(const AdamDots &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes that adam_dots_cuda_workspace asks for. Returns a cudaError_t.
GG_LENT int64_t adam_dots_cuda_workspace(const AdamDots &);
GG_LENT int adam_dots_cuda(const AdamDots &, void *workspace, void *stream);

} // namespace gg
