// What a kernel may ask of the card beyond plain CUDA C++, one instruction or two per function. tests/simt/core holds a
// header of the same name that does the same on a CPU: kernels that keep to these two lists run under both.
//   here:       conversions, copy_async*, load_matrix_x4_trans, multiply_*, opaque, sum_over_warp, dynamic_shared,
//   launch plain CUDA: __global__, __device__, __shared__, __launch_bounds__, __syncthreads, threadIdx, blockIdx, dim3
#pragma once
#include "core/array.h"
#include <cuda_runtime.h>

namespace gg {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

// Two neighbours at an address aligned to the pair.
__device__ __forceinline__ float2 load_pair(const float *p) { return *reinterpret_cast<const float2 *>(p); }
template <class Half> __device__ __forceinline__ float2 load_pair(const Half *p) {
  const uint32_t both = *reinterpret_cast<const uint32_t *>(p);
  return {widen(Half{uint16_t(both)}), widen(Half{uint16_t(both >> 16)})};
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

// The same value, of which the compiler knows no more: what is computed from it stays where it is used instead of being
// hoisted out of loops into registers.
__device__ __forceinline__ int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// By halving, so in a fixed order; every lane gets the sum.
template <class T> __device__ __forceinline__ T sum_over_warp(T x) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, half);
  return x;
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

} // namespace gg
