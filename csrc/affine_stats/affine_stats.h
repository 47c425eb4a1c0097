// affine_stats: per-sample gradients of the scale and shift of a normalisation layer, or of a bias, in one read.
//
//   y = weight * xhat + bias,  xhat = (x - mean) * rstd             mean and rstd per token, or per group of channels
//   W_i = sum_t b_it * xhat_it,  V_i = sum_t b_it                   (F)    elementwise products
//   weight_grad = sum_i W_i,  bias_grad = sum_i V_i                 (F)
//   weight_norms2_i = ||W_i||^2,  bias_norms2_i = ||V_i||^2         (B)
//   weight_dots_ik = <W_i, D_weight_k>,  bias_dots_ik = <V_i, D_bias_k>  (B, K)
//
// b and x (B,T,F) share one dtype: f32, bf16, f16 or f64. mean and rstd (B,T), D_weight and D_bias (K,F) and all
// outputs are float32 (float64 for f64 inputs). Without mean it is 0, without rstd 1; without x only the bias is asked
// for. Per-sample sums are of that dtype too; sums over groups of samples, and over features, are float64, in an order
// that depends on the shapes alone: the same bits for any number of threads. Sizes of 0 are legal and give zeros.
// Outputs must not overlap inputs.
//
// Channels first, b and x are (B,F,T), a feature being a channel and its tokens the points of space, and mean and rstd
// (B,G): feature f belongs to group f / (F/G). G divides F.
#pragma once
#include "core/array.h"

namespace gg {

struct AffineStats {
  // What is asked of one of the two parameters.
  struct Part {
    const void *D; // null when directions == 0; inner stride 1
    int64_t directions, D_direction;
    void *grad;   // null: not wanted, and nothing else of this part either; contiguous like the others
    void *norms2; // null: not wanted
    void *dots;   // null when directions == 0
  };

  DType dtype;                       // of b and x
  bool channels_first;               // rows of b and x are channels, else tokens
  int64_t samples, tokens, features; // B, T, F
  int64_t features_per_group;        // F/G; read only with channels_first
  const void *b;                     // inner stride 1; all strides count elements
  int64_t b_sample, b_row;
  const void *x; // null: bias only
  int64_t x_sample, x_row;
  const void *mean;               // null: 0
  int64_t mean_sample, mean_step; // step: to the next token's, or group's
  const void *rstd;               // null: 1
  int64_t rstd_sample, rstd_step;
  Part weight, bias;

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const { return (2.0 * tokens + weight.directions + bias.directions + 2) * samples * features; }
};

GG_LENT void affine_stats_cpu(const AffineStats &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes that affine_stats_cuda_workspace asks for. Returns a cudaError_t.
GG_LENT int64_t affine_stats_cuda_workspace(const AffineStats &);
GG_LENT int affine_stats_cuda(const AffineStats &, void *workspace, void *stream);

} // namespace gg
