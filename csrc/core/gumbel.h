// Gumbel noise of 64-bit ids, and a bound of it that needs no logarithm. The same bits on every machine.
#pragma once
#include "core/log.h"
#include "core/philox.h"

namespace GG_SIDE {

// h: 52 random bits for each id.
GG_FUNCTION batch<uint64_t> noise_bits(batch<uint64_t> id, uint64_t seed) {
  batch<uint64_t> words[4] = {id, id >> 32, {}, {}};
  philox4x32_10(words, seed);
  return (words[0] << 32 | words[1]) >> 12;
}

// G = -log(-log u), u = (h + 1/2) 2^-52: exact, as 1 + h 2^-52 less 1 - 2^-53.
GG_FUNCTION batch<double> gumbel(batch<uint64_t> h) {
  const batch<double> u = double_of_bits(h | 0x3ff0000000000000) - (1 - 0x1p-53);
  return -log_same_bits(-log_same_bits(u));
}

// x + G is at most this plus bound_offset, and no more than .06 below that where u is near 1: -log u >= 1 - u > m 2^-52
// with m = 2^52 - 1 - h, and the bits of m as a double, read as a fixed-point number, are 1023 + log2 m less 0 to
// .0861, the chord of each octave lying below the curve. Roundings take up to 1e-12, which limit_of_bound allows for.
constexpr double ln2 = 0.693147180559945309;
GG_FUNCTION batch<double> bound_of_key(batch<double> x, batch<uint64_t> h) {
  const batch<double> m = double_of_bits(h ^ 0x433fffffffffffff) - 0x1p52;
  return x - double_of_bits(bits_of_double(m) >> 11 | 0x4330000000000000) * (ln2 * 0x1p-41);
}
constexpr double bound_offset = ln2 * (52 + 1023 + 2048); // 2048: the 2^52 that carries the fixed-point number
// What a bound is compared with: the threshold, less what roundings may take from the bound.
GG_FUNCTION double limit_of_bound(double threshold) {
  const double size = threshold < 0 ? -threshold : threshold;
  return size < __builtin_inf() ? threshold - (size + 64) * 0x1p-40 - bound_offset : threshold;
}

} // namespace GG_SIDE
