// e^-y in vectors, for y >= 0 and a little below: what sums of softmax terms relative to a maximum are made of.
// Included only from per-ISA kernel sources, like core/simd.h.
//
//   n = round(-y / ln 2),  s = y + n ln 2 in [-0.347, 0.347],  e^-y = 2^n p(s)
//
// p is the polynomial of least relative error to e^-s among those with p(0) = 1: of degree 5 for float, off by 1.5 u
// (u = 2^-24), and 11 for double, 0.2 u (u = 2^-53). n is rounded by adding 1.5 * 2^23 (2^52), after which it lies in
// the sum's lowest bits, from where one shift brings it into the exponent.
//
// y must be in [-16, largest]. The result is within `ulps` units in the last place (tests/core/test_exp.py), exactly 1
// for y = 0, and has the same bits on AVX2 and AVX-512; without fused multiply-adds its last bits may differ.
// e^-largest is still a normal number, 1.6e-38 (3e-308 in double): nothing beside a sum that holds a 1, so that larger
// y can be cut off to it. y = NaN gives anything; the caller must notice it elsewhere.
#pragma once
#include "core/simd.h"
#include <type_traits>

namespace gg::GG_ISA {

template <class T> struct ExpTable;

template <> struct ExpTable<float> {
  using Bits = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr float largest = 87.0f;
  static constexpr double ulps = 5.5; // 3 for y < 16: see ln2_high
  static constexpr float shifter = 0x1.8p23f, log2_e = 0x1.715476p0f;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  // The float nearest to ln 2 is off by 0.05 u of it, so by 0.05 u y in s: a twentieth of what rounding y itself costs.
  static constexpr float ln2_high = 0x1.62e43p-1f, ln2_low = 0;
#else
  // In two parts, the first so short that its products with n are exact although they are rounded.
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
#endif
  static constexpr float coefficients[] = {0x1p0f,          -0x1.fffff6p-1f, 0x1.fffdc4p-2f,
                                           -0x1.555a6ep-3f, 0x1.573af6p-5f,  -0x1.0fa7bcp-7f};
};

template <> struct ExpTable<double> {
  using Bits = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr double largest = 708.0;
  static constexpr double ulps = 2;
  static constexpr double shifter = 0x1.8p52, log2_e = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double coefficients[] = {0x1p0,
                                            -0x1.0000000000003p+0,
                                            0x1.0000000000005p-1,
                                            -0x1.555555555481ep-3,
                                            0x1.55555555520cfp-5,
                                            -0x1.111111137b267p-7,
                                            0x1.6c16c17f3db73p-10,
                                            -0x1.a019f621f1c35p-13,
                                            0x1.a019a6769f8acp-16,
                                            -0x1.71f6138546560p-19,
                                            0x1.28a2b95f6082fp-22,
                                            -0x1.8ad0eec042e42p-26};
};

template <class T> static inline vec<T> exp_minus(vec<T> y) {
  using Table = ExpTable<T>;
  using Word = vec<std::make_unsigned_t<typename Table::Bits>>; // wraps around where y is out of range
  constexpr int degree = sizeof(Table::coefficients) / sizeof(T) - 1;
  const vec<T> shifted = splat(Table::shifter) - y * Table::log2_e;
  const vec<T> n = shifted - Table::shifter;
  vec<T> s = y + n * Table::ln2_high;
  if constexpr (Table::ln2_low != 0)
    s += n * Table::ln2_low;
  vec<T> p = splat(Table::coefficients[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k)
    p = p * s + Table::coefficients[k];
  return (vec<T>)((Word)p + ((Word)shifted << Table::mantissa_bits));
}

} // namespace gg::GG_ISA
