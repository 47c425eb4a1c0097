// Prints the largest error of core/exp.h in units in the last place and what it claims, for float near 0, float and
// double, then a fingerprint of all results: exp_error
#include "core/exp.h"

#include <cmath>
#include <cstdio>

using namespace gg::GG_ISA;

static uint64_t fingerprint = 0xcbf29ce484222325u;

template <class T> static double error_in_ulps(T y, T result) {
  const long double truth = std::exp(-static_cast<long double>(y));
  int exponent;
  std::frexp(static_cast<double>(truth), &exponent); // truth in [2^(e-1), 2^e)
  const long double ulp = std::ldexp(1.0L, exponent - 1 - ExpTable<T>::mantissa_bits);
  return static_cast<double>(std::fabs(static_cast<long double>(result) - truth) / ulp);
}

// The worst over `count` values, evenly from `from` to `to`.
template <class T> static double worst(double from, double to, int64_t count) {
  double most = 0;
  for (int64_t i = 0; i < count; i += lanes<T>) {
    vec<T> y;
    for (int l = 0; l < lanes<T>; ++l)
      y[l] = static_cast<T>(from + (to - from) * static_cast<double>(i + l) / static_cast<double>(count));
    const vec<T> found = exp_minus<T>(y);
    for (int l = 0; l < lanes<T>; ++l) {
      most = std::fmax(most, error_in_ulps<T>(y[l], found[l]));
      typename ExpTable<T>::Bits bits;
      const T x = found[l];
      std::memcpy(&bits, &x, sizeof x);
      fingerprint = (fingerprint ^ static_cast<uint64_t>(bits)) * 0x100000001b3u;
    }
  }
  return most;
}

int main() {
  std::printf("%.4f 3\n", std::fmax(worst<float>(-16, 16, 1 << 20), worst<float>(0, 0.4, 1 << 18)));
  std::printf("%.4f %.1f\n", worst<float>(16, ExpTable<float>::largest, 1 << 20), ExpTable<float>::ulps);
  std::printf("%.4f %.1f\n",
              std::fmax(worst<double>(-16, 1, 1 << 19), worst<double>(0, ExpTable<double>::largest, 1 << 19)),
              ExpTable<double>::ulps);
  std::printf("%d %d\n", exp_minus<float>(vec<float>{})[0] == 1, exp_minus<double>(vec<double>{})[0] == 1);
  std::printf("%016llx\n", static_cast<unsigned long long>(fingerprint));
}
