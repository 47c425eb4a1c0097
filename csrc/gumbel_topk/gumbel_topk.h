// gumbel_topk: k draws without replacement from softmax(scores / temperature), by adding noise and keeping the best.
//
//   h_i   = the top 52 bits of words 0 and 1, in this order, of Philox4x32-10 at counter (id_i, 0), key seed
//   G_i   = -log(-log u_i),   u_i = (h_i + 1/2) 2^-52              Gumbel noise: a function of id and seed alone
//   key_i = scores_i / temperature + G_i                           key_i = scores_i when temperature == 0
//   kept  = the k largest (key, id), ties by smaller id
//
// scores (n) are f32, f64, bf16 or f16, and everything after them is float64. Ids (n) are 64-bit patterns, low word
// first in the counter, compared as unsigned; without them document i has id i. Logarithms are core/log.h's, so keys
// have the same bits on every machine; what is kept is a function of the set of (id, score), so it has the same bits
// for any order, sharding and number of threads.
//
// The reservoir is the caller's: `held` entries of (keys, picks) of a `capacity`, and a `threshold` below which no key
// can be among the best k; it starts as held = 0, threshold = -infinity. A call lets all documents in, and thins the
// reservoir to the best k whenever it is full. A pick is an id, or with `by_position` a position in scores (held must
// be 0 then). With `finish` the best k come out alone, best first.
//
// -0 counts as 0. Infinite scores are legal: +infinity is drawn first and -infinity last. NaN is reported, by the
// smallest position, and never kept. Equal (id, key) are one document. Of one id with two keys the larger survives, if
// only one of them is among the best k; if both are, `finish` reports the smallest such id.
//
// What is wrong with documents is written to `fault`, never raised: on a card only the card knows it, as it alone knows
// `held` and `threshold`. The caller looks when it can wait.
#pragma once
#include "core/array.h"

namespace gg {

struct GumbelTopKFault {  // every call begins by writing this
  int64_t nan_at = -1;    // the smallest position in scores of a NaN
  int64_t two_scores = 0; // 1: one id with different keys among the kept, and its bits:
  uint64_t two_scores_id = ~uint64_t{0};
  int64_t no_room = 0; // 1, and nothing was done: `held`, `capacity` and k break the rules below; seen only on a card
};

struct GumbelTopK {
  static constexpr int64_t least_spare = 512; // capacity >= k + least_spare, unless all documents fit in any case
  static constexpr int64_t fault_words = sizeof(GumbelTopKFault) / sizeof(int64_t);

  DType dtype; // of scores
  int64_t count, k;
  uint64_t seed;
  double temperature; // 0, or from 1e-300 to 1e300
  bool by_position, finish;

  const void *scores;  // contiguous, like everything here
  const uint64_t *ids; // null: 0, 1, ...

  int64_t capacity;
  double *keys;
  int64_t *picks;
  int64_t *held;
  double *threshold;
  GumbelTopKFault *fault;

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const { return 20.0 * (count + *held); } // of noise, or to sort what is held; on a processor alone
};

GG_LENT void gumbel_topk_cpu(const GumbelTopK &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes that gumbel_topk_cuda_workspace asks for. Returns a cudaError_t.
GG_LENT int64_t gumbel_topk_cuda_workspace(const GumbelTopK &);
GG_LENT int gumbel_topk_cuda(const GumbelTopK &, void *workspace, void *stream);

} // namespace gg
