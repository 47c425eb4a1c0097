// embedding_stats: per-sample gradients of an embedding table, which are zero but for the rows a sample looked up.
//
//   row v of G_i = sum_{t: id_it = v} b_it                          (E)    one row at a time, never the (V, E) table
//   norms2_i     = sum_v ||row v of G_i||^2                         (B)    exact for repeated tokens
//   dots_ik      = <G_i, D_k> = sum_v <row v of G_i, row v of D_k>  (B, K)
//
// ids (B,T) are i32 or i64 and may repeat one row of memory for all samples (stride 0); b (B,T,E) is f32, bf16, f16 or
// f64; D (K,V,E) has b's dtype or that of its sums. Rows are summed in float32 (float64 for f64), products over rows at
// the latest in float64 where a task ends. The order depends on shapes and ids alone: the same bits for any number of
// threads. Positions with id == padding_idx contribute nothing. Every other id must be >= 0, and < V when D is given:
// the CPU's caller checks; on a card, where telling would mean waiting, a sample with such an id gets NaN. Sizes of 0
// are legal and give zeros. Outputs must not overlap inputs.
#pragma once
#include "core/array.h"

namespace gg {

struct EmbeddingStats {
  DType dtype;           // of b
  DType direction_dtype; // of D
  DType id_dtype;
  int64_t samples, tokens, features, directions; // B, T, E, K
  int64_t rows;                                  // V, or INT64_MAX without D
  int64_t padding_idx;                           // -1: none

  const void *ids; // all strides count elements
  int64_t id_sample, id_token;
  const void *b; // inner stride 1, like D
  int64_t b_sample, b_token;
  const void *D; // null when directions == 0
  int64_t D_direction, D_row;

  void *norms2; // null: not wanted; contiguous
  void *dots;   // null when directions == 0; contiguous

  int64_t id(int64_t i, int64_t t) const {
    const int64_t at = i * id_sample + t * id_token;
    return id_dtype == DType::i32 ? static_cast<const int32_t *>(ids)[at] : static_cast<const int64_t *>(ids)[at];
  }

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const { return (features * (2.0 + directions) + 8) * samples * tokens; } // eight to chain a token
};

GG_LENT void embedding_stats_cpu(const EmbeddingStats &);

// Where the first id is that no table has, as i * T + t; -1 if there is none. One pass over ids, before any is used as
// an address: 8 bytes for every row of b.
GG_LENT int64_t embedding_stats_bad_id(const EmbeddingStats &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes that embedding_stats_cuda_workspace asks for. Returns a cudaError_t.
GG_LENT int64_t embedding_stats_cuda_workspace(const EmbeddingStats &);
GG_LENT int embedding_stats_cuda(const EmbeddingStats &, void *workspace, void *stream);

} // namespace gg
