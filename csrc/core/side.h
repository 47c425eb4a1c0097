// For code that processors and cards share: inside `namespace GG_SIDE`, functions declared GG_FUNCTION compute batches.
// A batch is a vector of the instruction set in a kernel source of the CPU (GG_ISA), and a thread's own value in a CUDA
// one.
#pragma once
#if defined(GG_ISA)
#include "core/simd.h"
#define GG_SIDE gg::GG_ISA
#define GG_FUNCTION static inline
#define GG_UNROLL(n) GG_PRAGMA(GCC unroll n)
#else
#include "core/device.cuh"
#define GG_SIDE gg
#define GG_FUNCTION __device__ __forceinline__
#define GG_UNROLL(n) GG_PRAGMA(unroll n)
#endif
#define GG_PRAGMA(text) _Pragma(#text)

namespace GG_SIDE {

#if defined(GG_ISA)
template <class T> using batch = vec<T>;

// x y, rounded before anything is added to it: the product passes through what the compiler knows nothing of, where the
// build would let it fuse with a sum on machines that can.
template <class X> GG_FUNCTION vec<double> product(X x, vec<double> y) {
  vec<double> rounded = x * y;
#if defined(__x86_64__)
  asm("" : "+v"(rounded));
#elif defined(__aarch64__)
  asm("" : "+w"(rounded));
#else
  asm("" : "+m"(rounded));
#endif
  return rounded;
}

GG_FUNCTION vec<double> double_of_bits(vec<uint64_t> x) { return (vec<double>)x; }
GG_FUNCTION vec<uint64_t> bits_of_double(vec<double> x) { return (vec<uint64_t>)x; }
GG_FUNCTION vec<float> of_bits(vec<uint32_t> x) { return (vec<float>)x; }
GG_FUNCTION vec<uint32_t> bits_of(vec<float> x) { return (vec<uint32_t>)x; }
GG_FUNCTION vec<double> of_bits(vec<uint64_t> x) { return double_of_bits(x); }
GG_FUNCTION vec<uint64_t> bits_of(vec<double> x) { return bits_of_double(x); }
#else
template <class T> using batch = T; // product, double_of_bits and bits_of_double are core/device.cuh's
GG_FUNCTION float of_bits(uint32_t x) { return float_of_bits(x); }
GG_FUNCTION uint32_t bits_of(float x) { return bits_of_float(x); }
template <class T> GG_FUNCTION T larger(T x, T y) { return x > y ? x : y; }
GG_FUNCTION float root_of(float x) { return sqrt(x); }
// Within 2 units in the last place.
GG_FUNCTION float normal_root(float x) { return x * rsqrtf(x); }
GG_FUNCTION float normal_quotient(float x, float y) { return x * reciprocal_fast(y); }
#endif

} // namespace GG_SIDE
