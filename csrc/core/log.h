// The natural logarithm of doubles, with the same bits on every instruction set and every card: what is drawn with it
// must not depend on the machine, and the math libraries' own logarithms do.
#pragma once
#include "core/side.h"

namespace GG_SIDE {

// log x within 1 ulp, for normal x > 0. As in fdlibm's e_log.c (Sun Microsystems, 1993): x = 2^k (1 + f) with
// 1 + f in [sqrt(1/2), sqrt(2)), s = f / (2 + f), and log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)). Multiplications,
// additions and one division, in this order, each rounded once.
GG_FUNCTION batch<double> log_same_bits(batch<double> x) {
  constexpr uint64_t one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e00000000, mantissa = 0x000fffffffffffff;
  constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  constexpr double r[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                          2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                          1.479819860511658591e-01};
  const batch<uint64_t> shifted = bits_of_double(x) + (one - sqrt_half);
  // k + 1023 in the mantissa of 2^52: a conversion without the instruction, which AVX2 lacks.
  const batch<double> k = double_of_bits(shifted >> 52 | 0x4330000000000000) - (0x1p52 + 1023);
  const batch<double> f = double_of_bits((shifted & mantissa) + sqrt_half) - 1.0;

  const batch<double> half_square = product(product(0.5, f), f);
  const batch<double> s = f / (2.0 + f), z = product(s, s), w = product(z, z);
  const batch<double> even = product(w, r[1] + product(w, r[3] + product(r[5], w)));
  const batch<double> odd = product(z, r[0] + product(w, r[2] + product(w, r[4] + product(r[6], w))));
  const batch<double> tail = product(s, half_square + (even + odd)) + product(ln2_low, k);
  return ((tail - half_square) + f) + product(ln2_high, k);
}

} // namespace GG_SIDE
