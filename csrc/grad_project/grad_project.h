// grad_project: random projections of the per-sample gradients of a linear layer, G_i = sum_t b_it a_it^T (p, d), none
// of which is formed whole.
//
//   rademacher, gaussian   out_i    = P_out G_i P_in^T = sum_t (P_out b_it) (P_in a_it)^T     (B, k_out, k_in)
//   sparse                 out_i[h] = sum_{r,c,j: h_j(r,c) = h} s_j(r,c) G_i[r,c] / sqrt(nonzeros)      (B, k)
//
// a (B,T,d) and b (B,T,p) share one dtype: f32, bf16, f16 or f64; products and sums are float32 (float64 for f64), and
// so is out. P_out (k_out,p) and P_in (k_in,d) have that dtype or the sums'; one that is null is made from the seed.
//
// Everything random is a word of Philox4x32-10 with key (seed, seed >> 32) and counter (column, row / 4 or / 128,
// purpose, layer), so every backend draws the same:
//   rademacher  P[r,c] = +-1 / sqrt(k): bit r % 32 of word r / 32 % 4 at (c, r / 128, purpose) says minus
//   gaussian    P[r,c] = N / sqrt(k): Box-Muller on words 0, 1 and 2, 3 at (c, r / 4, purpose) gives rows 4q to 4q + 3:
//               sqrt(-2 log((w + 1/2) / 2^32)) times cos and sin of 2 pi w' / 2^32
//   sparse      w = word r % 4 at (c, r / 4, 2 + j), with 0 <= j < nonzeros: bit 0 says minus, and
//               h_j = first_j + (w (first_j+1 - first_j) >> 32), where first_j = j k / nonzeros rounded down
// The purpose of P_out is 0, that of P_in 1. Layers of one model are told apart by `layer`, so that their sketches add
// up to one of the whole gradient.
//
// The order of sums depends on shapes alone: the same bits for any number of threads. Sizes of 0 are legal; empty sums
// are 0. `out` must not overlap inputs.
#pragma once
#include "core/array.h"

namespace gg {

struct GradProject {
  enum class Kind : uint8_t { rademacher, gaussian, sparse };

  struct Matrix {
    const void *data; // null: made from the seed; inner stride 1
    DType dtype;
    int64_t row;
  };

  DType dtype; // of a and b
  Kind kind;
  int64_t samples, tokens, d, p; // B, T, d, p

  const void *a; // inner stride 1, like b; all strides count elements
  int64_t a_sample, a_token;
  const void *b;
  int64_t b_sample, b_token;

  int64_t k_out, k_in; // unless sparse
  Matrix P_out, P_in;
  int64_t buckets, nonzeros; // where sparse; 1 <= nonzeros <= buckets < 2^31

  uint64_t seed;
  uint32_t layer;
  void *out; // contiguous

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const {
    if (kind == Kind::sparse) // a hash takes about 20
      return double(d) * p * (samples * (tokens + double(nonzeros)) + 20.0 * nonzeros);
    const double outer = double(k_out) * k_in, matrices = double(k_out) * p + double(k_in) * d;
    const double drawn = P_out.data && P_in.data ? 1 : 20; // an element of a random matrix
    return samples * tokens * (matrices + outer) + drawn * matrices;
  }
};

GG_LENT void grad_project_cpu(const GradProject &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes, aligned to 16, that grad_project_cuda_workspace asks for. Returns a cudaError_t.
GG_LENT int64_t grad_project_cuda_workspace(const GradProject &);
GG_LENT int grad_project_cuda(const GradProject &, void *workspace, void *stream);

} // namespace gg
