// softmax_stats: how hard each row of logits finds its label, from one read of the logits.
//
//   p = softmax(z)                                      z (C) the logits of a row, q its label: onehot(y), or given
//   loss = -sum_c q_c log p_c                           cross-entropy; logsumexp(z) - z_y for a class number y
//   el2n = ||p - q||_2
//   entropy = -sum_c p_c log p_c
//   max_probability = max_c p_c                         each (B, T), float32 (float64 for f64 logits)
//
// logits (B,T,C) are f32, bf16, f16 or f64. labels are class numbers (B,T), i32 or i64, or distributions (B,T,C) of the
// logits' dtype or the outputs', q_c >= 0; their sum may be other than 1. A row whose class number is ignore_index
// gives 0 everywhere and is not read. Any other class number outside [0, C) makes its row the `*bad_row`, the first of
// them if there are several, and its outputs are not written; *bad_row is -1 if there are none.
//
// All four have a small relative error however confident the row: 1 - p_y is never formed, and no probability is
// squared without being scaled. Logits of -inf are classes that cannot be: probability 0, and an infinite loss where
// they are the label. A row with a NaN or +inf, or nothing but -inf, gives NaN everywhere. Ties need no care. A class
// with q_c = 0 adds nothing to the loss, not even where its logit is -inf.
//
// Sums are kept per block of a row in float32 (float64 for f64) and across blocks in float64, in an order that depends
// on the shapes alone: the same bits for any number of threads. Sizes of 0 are legal, though no class number is in [0,
// 0). Outputs must not overlap inputs.
#pragma once
#include "core/array.h"

namespace gg {

struct SoftmaxStats {
  DType dtype;                      // of logits
  DType label_dtype;                // i32, i64: class numbers; else distributions
  int64_t samples, tokens, classes; // B, T, C
  int64_t ignore_index;             // of no meaning for distributions

  const void *logits; // inner stride 1; all strides count elements
  int64_t logit_sample, logit_token;
  const void *labels; // inner stride 1 where they are distributions
  int64_t label_sample, label_token;

  void *loss, *el2n, *entropy, *max_probability; // contiguous; null: not wanted
  int64_t *bad_row;                              // i * T + t; lies where the kernel runs, like all of these

  constexpr int64_t class_number(int64_t i, int64_t t) const {
    const int64_t at = i * label_sample + t * label_token;
    return label_dtype == DType::i32 ? static_cast<const int32_t *>(labels)[at]
                                     : static_cast<const int64_t *>(labels)[at];
  }

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const { return 12.0 * samples * tokens * classes; } // most of them for the exponential
};

GG_LENT void softmax_stats_cpu(const SoftmaxStats &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes that softmax_stats_cuda_workspace asks for. Returns a cudaError_t.
GG_LENT int64_t softmax_stats_cuda_workspace(const SoftmaxStats &);
GG_LENT int softmax_stats_cuda(const SoftmaxStats &, void *workspace, void *stream);

} // namespace gg
