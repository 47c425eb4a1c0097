// Vectors of the compiled instruction set, by GCC/Clang vector extensions: as fast as intrinsics here, and the same
// source serves AVX-512, AVX2, SSE2, NEON. Included only from per-ISA kernel sources; everything sits in namespace
// GG_ISA so that no two copies can meet in the linker.
#pragma once
#include "core/array.h"
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gg::GG_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int vector_registers = 16;
#else
constexpr int vector_bytes = 16;
constexpr int vector_registers = 16;
#endif

template <class T> struct vector_of {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T> using vec = typename vector_of<T>::type;
template <class T> constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

template <class T> static inline vec<T> load(const T *from) {
  vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T> static inline void store(T *to, vec<T> v) { std::memcpy(to, &v, sizeof v); }

// x in every lane. Subtracting zero folds away; adding it would not, for the sake of -0.
template <class T> static inline vec<T> splat(T x) { return x - vec<T>{}; }

// Lane by lane; y where either is NaN: exactly what the processor's instructions do, and what this becomes.
template <class V> static inline V smaller(V x, V y) { return x < y ? x : y; }
template <class V> static inline V larger(V x, V y) { return x > y ? x : y; }

// Square roots, rounded correctly.
static inline vec<float> root_of(vec<float> x) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (vec<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vec<float>)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < lanes<float>; ++i)
    x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
static inline vec<double> root_of(vec<double> x) {
#if defined(__AVX512F__)
  return (vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
  return (vec<double>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (vec<double>)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < lanes<double>; ++i)
    x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// The same and quotients for normal numbers alone, within 0.6 units in the last place: where the processor has
// estimates of 14 bits, one with a step of Newton's takes less time than its root or division.
#if defined(__AVX512F__)
static inline vec<float> normal_root(vec<float> x) {
  const vec<float> inverse = (vec<float>)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x), root = x * inverse;
  return root + (x - root * root) * (0.5f * inverse);
}
static inline vec<float> normal_quotient(vec<float> x, vec<float> y) {
  const vec<float> inverse = (vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)y), quotient = x * inverse;
  return quotient + (x - quotient * y) * inverse;
}
#else
static inline vec<float> normal_root(vec<float> x) { return root_of(x); }
static inline vec<float> normal_quotient(vec<float> x, vec<float> y) { return x / y; }
#endif
static inline vec<double> normal_root(vec<double> x) { return root_of(x); }
static inline vec<double> normal_quotient(vec<double> x, vec<double> y) { return x / y; }

// 0, 1, ..., n - 1 as a pack of constants, for shuffles.
template <int... lane> struct Lanes {};
template <int n, int... lane> struct count_lanes : count_lanes<n - 1, n - 1, lane...> {};
template <int... lane> struct count_lanes<0, lane...> {
  using type = Lanes<lane...>;
};

// Lane l holds what lane l + by held.
template <class T, int by, int... lane> static inline vec<T> rotated(vec<T> v, Lanes<lane...>) {
  return __builtin_shufflevector(v, v, ((lane + by) % lanes<T>)...);
}
template <class T, int by> static inline vec<T> rotated(vec<T> v) {
  return rotated<T, by>(v, typename count_lanes<lanes<T>>::type{});
}

// Lane sums by halving: a fixed order, and log2(lanes) roundings instead of lanes.
template <class T, int half = lanes<T> / 2> static inline T sum_lanes(vec<T> v) {
  v += rotated<T, half>(v);
  if constexpr (half > 1)
    return sum_lanes<T, half / 2>(v);
  else
    return v[0];
}

// In every block of 2h lanes: the halves of x's block added, then those of y's.
template <int h, class V, int... lane> static inline V fold_pair(V x, V y, Lanes<lane...>) {
  constexpr int n = sizeof...(lane);
  return __builtin_shufflevector(x, y, (lane % (2 * h) < h ? lane : n + lane - h)...) +
         __builtin_shufflevector(x, y, (lane % (2 * h) < h ? lane + h : n + lane)...);
}

// Lane l is the sum of the lanes of v[l]: 2 shuffles per vector for all of them, where one alone takes log2(lanes).
template <class T, int h = lanes<T> / 2> static inline vec<T> sum_lanes_of_each(vec<T> *v) {
#pragma GCC unroll 8
  for (int i = 0; i < h; ++i)
    v[i] = fold_pair<h>(v[i], v[i + h], typename count_lanes<lanes<T>>::type{});
  if constexpr (h > 1)
    return sum_lanes_of_each<T, h / 2>(v);
  else
    return v[0];
}

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place, then rescale by 2^112: subnormals come out right too.
  uint32_t shifted = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &shifted, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) // infinity and NaN keep an all-ones exponent
    bits = 0x7f800000u | (static_cast<uint32_t>(x.bits & 0x3ff) << 13);
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

// The bits of consecutive elements, one in the lower half of each lane.
static inline vec<uint32_t> load_bits(const bf16 *p) {
  typedef uint16_t narrow __attribute__((vector_size(vector_bytes / 2)));
  narrow n;
  std::memcpy(&n, p, sizeof n);
  return __builtin_convertvector(n, vec<uint32_t>);
}

// lanes<accumulator> consecutive elements, widened.
static inline vec<float> load_wide(const float *p) { return load(p); }
static inline vec<double> load_wide(const double *p) { return load(p); }
static inline vec<float> load_wide(const bf16 *p) { return (vec<float>)(load_bits(p) << 16); }
static inline vec<float> load_wide(const f16 *p) {
#if defined(__AVX512F__)
  // With a mask of ones: GCC warns of the plain one, that its own header leaves a register undefined.
  return (vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#elif defined(__AVX2__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#else
  vec<float> f;
  for (int i = 0; i < lanes<float>; ++i)
    f[i] = widen(p[i]);
  return f;
#endif
}

// A vector of accumulators as its storage type has it: rounded to nearest, ties to even; NaN stays NaN.
typedef uint16_t halves __attribute__((vector_size(vector_bytes / 2)));
static inline vec<float> narrow(float, vec<float> v) { return v; }
static inline vec<double> narrow(double, vec<double> v) { return v; }
static inline halves narrow(bf16, vec<float> v) {
  typedef uint32_t wide __attribute__((vector_size(vector_bytes)));
  wide bits;
  std::memcpy(&bits, &v, sizeof v);
  const wide rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
  return __builtin_convertvector((v == v ? rounded : quiet) >> 16, halves);
}
static inline halves narrow(f16, vec<float> v) {
#if defined(__AVX512F__)
  return (halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  halves h;
  for (int i = 0; i < lanes<float>; ++i) {
    uint32_t bits;
    std::memcpy(&bits, reinterpret_cast<const char *>(&v) + 4 * i, 4);
    uint32_t size = bits & 0x7fffffff;
    if (size >= 0x47800000) { // 2^16 and more
      size = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (size < 0x38800000) { // subnormal: adding 1/2 leaves what is kept in the low bits
      float f;
      std::memcpy(&f, &size, 4);
      f += 0.5f;
      std::memcpy(&size, &f, 4);
      size -= 0x3f000000;
    } else { // the exponent counts from another zero; ties to even
      size = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    }
    h[i] = static_cast<uint16_t>(size | (bits >> 16 & 0x8000));
  }
  return h;
#endif
}

// Half number `part` of a vector of floats as doubles; a vector of doubles is its own only part. By intrinsics, because
// GCC 12 would cut a generic conversion into quarters and go through memory for a half.
template <int part> static inline vec<double> as_doubles(vec<float> v) {
#if defined(__AVX512F__)
  const __m256 half = _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, part);
  return (vec<double>)_mm512_maskz_cvtps_pd(0xff, half);
#elif defined(__AVX2__)
  const __m128 half = part ? _mm256_extractf128_ps((__m256)v, 1) : _mm256_castps256_ps128((__m256)v);
  return (vec<double>)_mm256_cvtps_pd(half);
#else
  return __builtin_convertvector(__builtin_shufflevector(v, v, 2 * part, 2 * part + 1), vec<double>);
#endif
}
template <int> static inline vec<double> as_doubles(vec<double> v) { return v; }

// Adds the halves of x to the lanes of a float64 sum.
static inline void add_wide(vec<double> &sum, vec<double> x) { sum += x; }
static inline void add_wide(vec<double> &sum, vec<float> x) { sum += as_doubles<0>(x) + as_doubles<1>(x); }

// Stores past the caches, for results that no cache could hold until they are read: the line is not read first. `to` is
// a multiple of 16 bytes; a thread that has streamed must call finish_streams() before another one may look.
template <class V> static inline void stream(void *to, V v) {
#if defined(__x86_64__)
  for (size_t at = 0; at + 16 <= sizeof v; at += 16) {
    __m128i sixteen;
    std::memcpy(&sixteen, reinterpret_cast<const char *>(&v) + at, 16);
    _mm_stream_si128(reinterpret_cast<__m128i *>(static_cast<char *>(to) + at), sixteen);
  }
  if (sizeof v < 16)
#endif
    std::memcpy(to, &v, sizeof v);
}
static inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Widens n elements into `to`, then zeros up to `padded`.
template <class In, class Acc> static inline void copy_padded(const In *from, Acc *to, int64_t n, int64_t padded) {
  int64_t i = 0;
  for (; i + lanes<Acc> <= n; i += lanes<Acc>)
    store(to + i, load_wide(from + i));
  for (; i < n; ++i)
    to[i] = widen(from[i]);
  for (; i < padded; ++i)
    to[i] = 0;
}

// The same for a row of `width` elements known to the compiler: the whole row, as it nearly always is, costs a few
// cycles; going through copy_padded would cost fifty.
template <int width, class In, class Acc> static inline void copy_row(const In *from, Acc *to, int64_t n) {
  static_assert(width % lanes<Acc> == 0);
  if (n < width)
    return copy_padded(from, to, n, width);
#pragma GCC unroll 8
  for (int v = 0; v < width; v += lanes<Acc>)
    store(to + v, load_wide(from + v));
}

// Runs a room's Kernel<input type, accumulator> for the dtype of its arguments.
template <template <class, class> class Kernel, class Args> static inline void run_kernel(const Args &args) {
  switch (args.dtype) {
  case DType::f32: return Kernel<float, float>(args).run();
  case DType::f64: return Kernel<double, double>(args).run();
  case DType::bf16: return Kernel<bf16, float>(args).run();
  default: return Kernel<f16, float>(args).run();
  }
}

} // namespace gg::GG_ISA
