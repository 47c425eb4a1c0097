// The natural logarithm of vectors of doubles, with the same bits on every instruction set: what is drawn with it must
// not depend on the machine, and the math libraries' own logarithms do.
#pragma once
#include "core/simd.h"

namespace gg::GG_ISA {

// x, of which the compiler knows no more: a product that passes through here is rounded before it is added, where the
// build would let it fuse with the sum on machines that can.
static inline vec<double> rounded(vec<double> x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

static inline vec<double> double_of_bits(vec<uint64_t> x) { return (vec<double>)x; }
static inline vec<uint64_t> bits_of_double(vec<double> x) { return (vec<uint64_t>)x; }

// log x within 1 ulp, for normal x > 0. As in fdlibm's e_log.c (Sun Microsystems, 1993): x = 2^k (1 + f) with
// 1 + f in [sqrt(1/2), sqrt(2)), s = f / (2 + f), and log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)). Multiplications,
// additions and one division, in this order, each rounded once.
static inline vec<double> log_same_bits(vec<double> x) {
  constexpr uint64_t one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e00000000, mantissa = 0x000fffffffffffff;
  constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  constexpr double r[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                          2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                          1.479819860511658591e-01};
  const vec<uint64_t> shifted = bits_of_double(x) + (one - sqrt_half);
  // k + 1023 in the mantissa of 2^52: a conversion without the instruction, which AVX2 lacks.
  const vec<double> k = double_of_bits(shifted >> 52 | 0x4330000000000000) - (0x1p52 + 1023);
  const vec<double> f = double_of_bits((shifted & mantissa) + sqrt_half) - 1.0;

  const vec<double> half_square = rounded(rounded(0.5 * f) * f);
  const vec<double> s = f / (2.0 + f), z = rounded(s * s), w = rounded(z * z);
  const vec<double> even = rounded(w * (r[1] + rounded(w * (r[3] + rounded(w * r[5])))));
  const vec<double> odd = rounded(z * (r[0] + rounded(w * (r[2] + rounded(w * (r[4] + rounded(w * r[6])))))));
  const vec<double> tail = rounded(s * (half_square + (even + odd))) + rounded(k * ln2_low);
  return ((tail - half_square) + f) + rounded(k * ln2_high);
}

} // namespace gg::GG_ISA
