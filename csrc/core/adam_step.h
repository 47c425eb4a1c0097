// d = step(g) - step(0) of AdamW, elementwise, for processors and cards. With x = |g| sqrt((1 - beta2) / bc2) and
// r0 = sqrt(beta2 v / bc2), which are on one scale, the root of the second moment goes from r0 to r = sqrt(r0^2 + x^2):
//
//   d = unit (-sign(g) x / (r + eps)  +  pull x^2 / ((r + r0) (r + eps))),   unit = eta (1 - beta1) / (bc1 (x / |g|)),
//                                                               pull = m beta1 / (1 - beta1) (x / |g|) / (r0 + eps)
//
// the new gradient's own step, and the momentum's, shrunk because the root has grown: r - r0 = x^2 / (r + r0). Nothing
// is subtracted but these two from one another, so an error is one relative to the sum of their sizes. Both go over one
// denominator: one root and one division. Whoever sums multiplies by `unit` at the end.
//
// Squares would leave the range of the type where x and r0 are beyond the root of it, so both are first multiplied by a
// power of two p that brings the larger into [2, 4).
#pragma once
#include "core/side.h"
#include <cmath>

namespace GG_SIDE {

// r0 is at least `smallest`, whose p is the largest one. No denominator is 0 then, where g = v = 0; in exchange what is
// not far above it (1e-35 in float32) is as good as 0.
template <class T> struct StepRange;
template <> struct StepRange<float> {
  static constexpr uint32_t exponent = 0x7f800000, sign = 0x80000000;
  static constexpr float smallest = 0x1p-118f;
};
template <> struct StepRange<double> {
  static constexpr uint64_t exponent = 0x7ff0000000000000, sign = 0x8000000000000000;
  static constexpr double smallest = 0x1p-1000;
};

// What is the same for every element.
template <class T> struct StepConstants {
  T scale, momentum, root, eps;
  double unit;

  StepConstants(double eta, double beta1, double beta2, double eps_, double bc1, double bc2) {
    const double x_of_g = std::sqrt((1 - beta2) / bc2);
    scale = T(x_of_g), momentum = T(beta1 / (1 - beta1) * x_of_g);
    root = T(std::sqrt(beta2 / bc2)), eps = T(eps_);
    unit = eta * (1 - beta1) / bc1 / x_of_g;
  }
};

// What is the same for every sample: r0 and pull of some elements.
template <class T> struct StepState {
  batch<T> root, pull;
};
template <class T> GG_FUNCTION StepState<T> step_state(const StepConstants<T> &constants, batch<T> m, batch<T> v) {
  const batch<T> root = larger(constants.root * root_of(v), StepRange<T>::smallest - batch<T>{});
  return {root, constants.momentum * m / (root + constants.eps)};
}

// d / unit; x comes with the sign of g.
template <class T> GG_FUNCTION batch<T> step_change(T eps, StepState<T> state, batch<T> x) {
  using Range = StepRange<T>;
  // Numbers without a sign are ordered as their bits are; p's exponent is minus that of the larger, and one more.
  const auto larger_bits = larger(bits_of(x) & ~Range::sign, bits_of(state.root));
  const batch<T> p = of_bits(~larger_bits & Range::exponent);
  const batch<T> scaled = x * p, root0 = state.root * p, square = scaled * scaled;
  const batch<T> root = normal_root(root0 * root0 + square), roots = root + root0;
  return normal_quotient(state.pull * square - scaled * roots, (root + eps * p) * roots);
}

} // namespace GG_SIDE
