// The roofs of this machine, as a kernel of this build meets them: multiply-adds that never leave the registers,
// and memory that is only read, or copied, or added, by all threads of the pool. Not an op: what the ops are measured
// against.
#pragma once
#include "core/array.h"

namespace gg {

struct Roofs {
  DType dtype;    // in: of the products; sums are f32, or f64 for f64
  double seconds; // in: at least this long for each roof; the median of the repeats is kept
  float *memory;  // in: what to read, and to copy from its first half to its second
  int64_t bytes;  // in: of memory; far above the last-level cache, or the cache is what gets measured
  double *flops;  // out: operations per second, a multiply-add counts two
  double *read;   // out: bytes read per second
  double *copy;   // out: bytes read plus bytes written per second
  double *triad;  // out: the same, of two arrays read and their sum written past the caches to a third
};

void roofs_cpu(const Roofs &);

} // namespace gg
