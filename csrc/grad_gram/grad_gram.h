// grad_gram: inner products of per-sample gradients of a linear layer, from the products of their tokens.
//
//   G_i    = sum_t b_it a_it^T                                    (p, d)   never formed
//   out_ij = <G_i, G'_j> = sum_{t,s} (a_it . a2_js) (b_it . b2_js)  (B, B2)
//   out_i  = ||G_i||_F^2 when `diagonal`                            (B)
//
// a (B,T,d), b (B,T,p), a2 (B2,T2,d) and b2 (B2,T2,p) share one dtype: f32, bf16, f16 or f64. Without a second side
// the result is symmetric: half of it is computed and mirrored, bit for bit. Scores of tokens are float32 (float64 for
// f64 inputs), their products are added tile by tile in float64, in an order that depends on the shapes alone: the same
// bits for any number of threads. No T x T2 matrix is stored. Sizes of 0 are legal and give zeros. `out` must not
// overlap inputs. Rounding may leave a diagonal entry a little below zero.
#pragma once
#include "core/array.h"

namespace gg {

struct GradGram {
  struct Side {
    int64_t samples, tokens;
    const void *a; // inner stride 1, like b; all strides count elements
    int64_t a_sample, a_token;
    const void *b;
    int64_t b_sample, b_token;
  };

  DType dtype;
  int64_t d, p;
  Side left, right; // equal when symmetric
  bool symmetric;   // no second side was given
  bool diagonal;    // implies symmetric
  void *out;
  int64_t out_row; // unused when `diagonal`: out is contiguous then

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const {
    const double pairs = double(left.samples) * (diagonal ? 1 : right.samples);
    return pairs * left.tokens * right.tokens * (d + p);
  }
};

GG_LENT void grad_gram_cpu(const GradGram &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes that grad_gram_cuda_workspace asks for. Returns a cudaError_t.
GG_LENT int64_t grad_gram_cuda_workspace(const GradGram &);
GG_LENT int grad_gram_cuda(const GradGram &, void *workspace, void *stream);

} // namespace gg
