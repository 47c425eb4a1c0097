// What a kernel may ask of the card beyond plain CUDA C++, one instruction or two per function. tests/simt/core holds a
// header of the same name that does the same on a CPU: kernels that keep to these two lists run under both.
//   here:       widen, narrow, load_pair, Vector, load_vector, load_vector_once, store_vector, copy_async*,
//               load_matrix_x4_trans, multiply_*, round_to_tf32, float_of_bits, bits_of_float, opaque,
//               shuffle_down, shuffle_xor, broadcast, vote, sum_over_warp, max_over_warp, merge_over_warp,
//               atomic_add, atomic_max, atomic_min, atomic_swap_if, dynamic_shared, launch, product,
//               double_of_bits, bits_of_double, load_matrix_x4, match_over_warp, smaller_or_nan, larger_or_nan,
//               exp2_fast, reciprocal_fast
//   plain CUDA: __global__, __device__, __host__, __forceinline__, __launch_bounds__, __restrict__, __syncthreads,
//               __syncwarp, __threadfence, threadIdx, blockIdx, blockDim, gridDim (all one-dimensional), float2,
//               __popc, __popcll, __ffs, __ffsll, __clz, __clzll, __umulhi, __umul64hi, rsqrtf, <cmath>'s functions;
//               cudaMemsetAsync, cudaMemset2DAsync, cudaMemcpyAsync from device to device, cudaGetDevice,
//               cudaDeviceGetAttribute; __grid_constant__
#pragma once
#include "core/array.h"
#include <cmath>
#include <cstring>
#include <cuda_runtime.h>
#include <type_traits>

namespace gg {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

__device__ __forceinline__ double widen(double x) { return x; }

// The nearest value of a type, ties to even.
template <class T> __device__ __forceinline__ T narrow(float x) { return T(x); }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) {
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
}
template <> __device__ __forceinline__ f16 narrow<f16>(float x) {
  f16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
}

// Two neighbours at an address aligned to the pair.
__device__ __forceinline__ float2 load_pair(const float *p) { return *reinterpret_cast<const float2 *>(p); }
template <class Half> __device__ __forceinline__ float2 load_pair(const Half *p) {
  const uint32_t both = *reinterpret_cast<const uint32_t *>(p);
  return {widen(Half{uint16_t(both)}), widen(Half{uint16_t(both >> 16)})};
}

// 16 bytes of neighbours, read and written by one instruction at an address that is a multiple of 16, in global or
// shared memory. What is read `once` leaves the caches first.
template <class T> struct alignas(16) Vector {
  static constexpr int size = 16 / int(sizeof(T));
  T at[size];
};
template <class T> __device__ __forceinline__ Vector<T> load_vector(const T *p) {
  const uint4 words = *reinterpret_cast<const uint4 *>(p);
  Vector<T> v;
  std::memcpy(&v, &words, 16);
  return v;
}
template <class T> __device__ __forceinline__ Vector<T> load_vector_once(const T *p) {
  const uint4 words = __ldcs(reinterpret_cast<const uint4 *>(p)); // of global memory alone
  Vector<T> v;
  std::memcpy(&v, &words, 16);
  return v;
}
template <class T> __device__ __forceinline__ void store_vector(T *p, const Vector<T> &v) {
  uint4 words;
  std::memcpy(&words, &v, 16);
  *reinterpret_cast<uint4 *>(p) = words;
}

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies the first `valid` of 16 (or 4) bytes from global to shared memory and zeroes the rest; the bytes are there
// after the wait for their group and a barrier. 16-byte copies go past L1: what they read is shared through L2.
__device__ __forceinline__ void copy_async_16(void *to, const void *from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(void *to, const void *from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements, transposed: lane l gives the address of row l % 8 of matrix l / 8, and gets in
// register m the elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of matrix m.
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += x y on the tensor cores: x is 16 x k, y is k x 8, c is 16 x 8 in float32.
__device__ __forceinline__ void multiply_m16n8k16(float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2], bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
}
__device__ __forceinline__ void multiply_m16n8k16(float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2], f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
}
__device__ __forceinline__ void multiply_m16n8k8_tf32(float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
}

// The nearest float with 10 explicit mantissa bits, as the bits that tensor cores take.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }

// The same value, of which the compiler knows no more: what is computed from it stays where it is used instead of being
// hoisted out of loops into registers.
__device__ __forceinline__ int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Between the lanes of a warp; all 32 must come here. A value is any plain struct of whole 32-bit words.
template <class T, class Shuffle> __device__ __forceinline__ T shuffle_words(const T &x, Shuffle shuffle) {
  static_assert(sizeof(T) % 4 == 0 && std::is_trivially_copyable_v<T>, "shuffles move whole words");
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &x, sizeof(T));
#pragma unroll
  for (uint32_t &word : words)
    word = shuffle(word);
  T y;
  std::memcpy(&y, words, sizeof(T));
  return y;
}
// The value of the lane `distance` further up; the last `distance` lanes keep their own.
template <class T> __device__ __forceinline__ T shuffle_down(const T &x, int distance) {
  return shuffle_words(x, [=](uint32_t word) { return __shfl_down_sync(0xffffffffu, word, distance); });
}
// The value of lane (own ^ mask).
template <class T> __device__ __forceinline__ T shuffle_xor(const T &x, int mask) {
  return shuffle_words(x, [=](uint32_t word) { return __shfl_xor_sync(0xffffffffu, word, mask); });
}
// The value of a lane, which may differ from lane to lane.
template <class T> __device__ __forceinline__ T broadcast(const T &x, int lane) {
  return shuffle_words(x, [=](uint32_t word) { return __shfl_sync(0xffffffffu, word, lane); });
}
// Bit l says whether lane l came with true.
__device__ __forceinline__ uint32_t vote(bool is) { return __ballot_sync(0xffffffffu, is); }

// Over a warp by halving, so in a fixed order; every lane gets the result.
template <class T> __device__ __forceinline__ T sum_over_warp(T x) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2)
    x += shuffle_xor(x, half);
  return x;
}
// NaNs are passed over.
template <class T> __device__ __forceinline__ T max_over_warp(T x) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    const T y = shuffle_xor(x, half);
    x = x < y || x != x ? y : x;
  }
  return x;
}
// merge(x, y) gets x from the lower lane, so that all lanes end with the same bits whatever merge does with its order.
template <class T, class Merge> __device__ __forceinline__ T merge_over_warp(T x, Merge merge) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    const T y = shuffle_xor(x, half);
    x = threadIdx.x & unsigned(half) ? merge(y, x) : merge(x, y);
  }
  return x;
}

// Integers alone: sums of floats would depend on who comes first. Each returns what was there before. The types are
// int32_t, uint32_t and uint64_t, in global or shared memory.
template <class T> using AtomicWord = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;
template <class T> __device__ __forceinline__ AtomicWord<T> *atomic_word(T *at) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || std::is_same_v<T, uint64_t>), "no such atomic");
  return reinterpret_cast<AtomicWord<T> *>(at);
}
template <class T> __device__ __forceinline__ T atomic_add(T *at, T x) {
  return T(atomicAdd(atomic_word(at), AtomicWord<T>(x)));
}
template <class T> __device__ __forceinline__ T atomic_max(T *at, T x) {
  return T(atomicMax(atomic_word(at), AtomicWord<T>(x)));
}
template <class T> __device__ __forceinline__ T atomic_min(T *at, T x) {
  return T(atomicMin(atomic_word(at), AtomicWord<T>(x)));
}
// Writes x where `expected` stands.
template <class T> __device__ __forceinline__ T atomic_swap_if(T *at, T expected, T x) {
  return T(atomicCAS(atomic_word(at), AtomicWord<T>(expected), AtomicWord<T>(x)));
}

// For doubles, passed through.
template <class T> __device__ __forceinline__ T narrow(double x) { return T(x); }
// The smaller or larger of two; NaN where one of them is.
__device__ __forceinline__ float smaller_or_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
__device__ __forceinline__ float larger_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
__device__ __forceinline__ double smaller_or_nan(double x, double y) { return y > x ? x : y; } // y is the unknown one
__device__ __forceinline__ double larger_or_nan(double x, double y) { return y < x ? x : y; }
// 2^x within 2^-22 of itself; 0 where that is no normal number.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x within an ulp; of normal numbers whose reciprocal is one.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ char *dynamic_shared() {
  extern __shared__ __align__(16) char gg_dynamic_shared[];
  return gg_dynamic_shared;
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void *stream,
                   Args... args) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error != cudaSuccess)
    return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, Parameters(args)...);
}

// Arithmetic in float64 that must have the same bits everywhere: a product that is rounded before anything is added to
// it, whatever the compiler would fuse, and bits as they are.
__device__ __forceinline__ double product(double x, double y) { return __dmul_rn(x, y); }
__device__ __forceinline__ double double_of_bits(uint64_t bits) { return __longlong_as_double(int64_t(bits)); }
__device__ __forceinline__ uint64_t bits_of_double(double x) { return uint64_t(__double_as_longlong(x)); }

// Four 8x8 matrices of 16-bit elements, as they lie: lane l gives the address of row l % 8 of matrix l / 8, and gets in
// register m the 32-bit word l % 4 of row l / 4 of matrix m.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The lanes whose x equals the caller's, as bits.
__device__ __forceinline__ uint32_t match_over_warp(uint32_t x) { return __match_any_sync(0xffffffffu, x); }

} // namespace gg
