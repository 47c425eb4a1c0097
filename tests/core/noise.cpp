// Prints what core/philox.h gives for the counters and keys on stdin, in one lane and in all lanes of a vector, and how
// far core/log.h is from the logarithm of long double.
#include "core/log.h"
#include "core/philox.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <initializer_list>

using namespace gg::GG_ISA;

int main() {
  uint64_t c[4], key[2];
  while (scanf("%" SCNx64 "%" SCNx64 "%" SCNx64 "%" SCNx64 "%" SCNx64 "%" SCNx64, &c[0], &c[1], &c[2], &c[3], &key[0],
               &key[1]) == 6) {
    vec<uint64_t> many[4];
    for (int w = 0; w < 4; ++w)
      many[w] = splat(c[w]);
    philox4x32_10(c, key[1] << 32 | key[0]);
    philox4x32_10(many, key[1] << 32 | key[0]);
    for (int w = 0; w < 4; ++w) {
      for (int l = 0; l < lanes<uint64_t>; ++l)
        if (many[w][l] != c[w])
          return 1;
      printf("%08" PRIx64 " ", c[w]);
    }
    printf("\n");
  }

  double worst = 0;
  const auto check = [&](double x) {
    const double y = log_same_bits(splat(x))[0];
    const long double exact = std::log(static_cast<long double>(x));
    const double ulp = std::nextafter(std::fabs(y), INFINITY) - std::fabs(y);
    worst = std::fmax(worst, static_cast<double>(std::fabs(y - exact) / (x == 1 ? 1 : ulp)));
  };
  uint64_t random[4];
  for (uint64_t i = 0; i < 500000; ++i) {
    random[0] = i, random[1] = random[2] = random[3] = 0;
    philox4x32_10(random, 1);
    const double u = (static_cast<double>((random[0] << 32 | random[1]) >> 12) + 0.5) * 0x1p-52;
    check(u), check(1 - u / 1024), check(-std::log(u)), check(std::ldexp(1 + u, static_cast<int>(i % 2000) - 1000));
  }
  for (double x :
       {0x1p-53, 1 - 0x1p-53, 1.0, 1 + 0x1p-52, 0x1p-1022, 0x1.fffffffffffffp1023, 0x1.6a09ep-1, 0x1.6a09fp-1})
    check(x);
  printf("%.4f\n", worst);
}
