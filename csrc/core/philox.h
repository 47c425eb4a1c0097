// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw (SC 2011): four random words from a
// 128-bit counter and a 64-bit key, with no state in between.
#pragma once
#include "core/side.h"

namespace GG_SIDE {

// The 64-bit product of the low 32 bits of every lane with m.
GG_FUNCTION uint64_t wide_product(uint64_t x, uint32_t m) { return (x & 0xffffffffu) * m; }
#if defined(GG_ISA)
GG_FUNCTION vec<uint64_t> wide_product(vec<uint64_t> x, uint32_t m) {
#if defined(__AVX512F__)
  return (vec<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi64(m)); // unmasked, gcc 12 warns
#elif defined(__AVX2__)
  return (vec<uint64_t>)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#elif defined(__x86_64__)
  return (vec<uint64_t>)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(m));
#else
  return (x & 0xffffffffu) * uint64_t{m};
#endif
}
#endif

// Replaces a counter by its random words. A word is the low half of a 64-bit lane: of uint64_t for one counter, of
// vec<uint64_t> for many. Between rounds the high halves hold what is left of products; they are cleared at the end.
template <class Lanes> GG_FUNCTION void philox4x32_10(Lanes (&c)[4], uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  GG_UNROLL(10)
  for (int round = 0; round < 10; ++round) {
    const Lanes p = wide_product(c[0], 0xD2511F53u), q = wide_product(c[2], 0xCD9E8D57u);
    c[0] = (q >> 32) ^ c[1] ^ uint64_t { key0 };
    c[1] = q;
    c[2] = (p >> 32) ^ c[3] ^ uint64_t { key1 };
    c[3] = p;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (Lanes &word : c)
    word &= 0xffffffffu;
}

} // namespace GG_SIDE
