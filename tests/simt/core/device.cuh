// The device primitives of csrc/core/device.cuh, executed by simt.h. Fragment layouts are those of the PTX ISA ("Matrix
// Fragments for mma.m16n8k8 / m16n8k16", "ldmatrix"), written down here a second time and on purpose not shared.
#pragma once
#include "core/array.h"
#include "simt.h"
#include <cmath>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() simt::sync_threads()
#define __syncwarp() simt::warp_instruction("syncwarp", [](simt::Warp &) {})
#define threadIdx (simt::current().thread)
#define blockIdx (simt::block.index)

struct alignas(8) float2 {
  float x, y;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerMultiprocessor };
using cudaStream_t = void *;

inline cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
  *value = int(simt::settings.shared_per_multiprocessor);
  return cudaSuccess;
}
inline cudaError_t cudaMemset2DAsync(void *to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t row = 0; row < height; ++row)
    std::memset(static_cast<char *>(to) + row * pitch, value, width);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset2DAsync(to, bytes, value, bytes, 1, stream);
}

namespace gg {

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                          : std::ldexp(float(mantissa + 1024), exponent - 25);
  return x.bits >> 15 ? -magnitude : magnitude;
}

template <class T> inline float2 load_pair(const T *p) {
  simt::require(reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T)) == 0, "misaligned pair");
  return {widen(p[0]), widen(p[1])};
}

inline void copy_async_16(void *to, const void *from, int valid) { simt::copy_async(to, from, 16, valid); }
inline void copy_async_4(void *to, const void *from, int valid) { simt::copy_async(to, from, 4, valid); }
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int pending> inline void copy_async_wait() { simt::copy_async_wait(pending); }

inline void load_matrix_x4_trans(uint32_t (&r)[4], const void *row) {
  simt::require_shared(row, 16, 16);
  std::memcpy(simt::current_slot().bytes, &row, sizeof row);
  simt::warp_instruction("ldmatrix.x4.trans", [](simt::Warp &warp) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const void *from;
      std::memcpy(&from, warp.slot[lane].bytes, sizeof from);
      std::memcpy(matrix[lane / 8][lane % 8], from, 16);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int half = 0; half < 2; ++half)
          std::memcpy(warp.slot[lane].bytes + 4 * m + 2 * half, &matrix[m][lane % 4 * 2 + half][lane / 4], 2);
  });
  std::memcpy(r, simt::current_slot().bytes, 16);
}

// One lane's part of d = x y + c.
struct MultiplyOperands {
  uint32_t x[4], y[2];
  float c[4];
};

// Tensor cores add exactly and cut the sum off: measured on cards, and the worse case for errors.
inline float cut_off(double sum) {
  const float nearest = float(sum);
  return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// `inner` is k; unpack(x) gives the one or two elements of a register.
template <int inner, class Unpack>
inline void multiply(const char *name, float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2], Unpack unpack) {
  MultiplyOperands own;
  std::memcpy(own.x, x, sizeof x);
  std::memcpy(own.y, y, sizeof y);
  std::memcpy(own.c, c, sizeof c);
  std::memcpy(simt::current_slot().bytes, &own, sizeof own);
  simt::warp_instruction(name, [&](simt::Warp &warp) {
    constexpr int packed = inner / 8; // elements per register: 1 for k8, 2 for k16
    float X[16][inner], Y[inner][8];
    MultiplyOperands lanes[32];
    for (int lane = 0; lane < 32; ++lane) {
      std::memcpy(&lanes[lane], warp.slot[lane].bytes, sizeof(MultiplyOperands));
      const int group = lane / 4, k = lane % 4 * packed;
      for (int half = 0; half < packed; ++half) {
        for (int e = 0; e < 4; ++e)
          X[group + e % 2 * 8][k + e / 2 * (inner / 2) + half] = unpack(lanes[lane].x[e], half);
        for (int e = 0; e < 2; ++e)
          Y[k + e * (inner / 2) + half][group] = unpack(lanes[lane].y[e], half);
      }
    }
    double sums[16][8] = {};
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < inner; ++k)
        for (int j = 0; j < 8; ++j)
          sums[i][j] += double(X[i][k]) * double(Y[k][j]);
    for (int lane = 0; lane < 32; ++lane) {
      float result[4];
      for (int e = 0; e < 4; ++e)
        result[e] = cut_off(sums[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] + double(lanes[lane].c[e]));
      std::memcpy(warp.slot[lane].bytes, result, sizeof result);
    }
  });
  std::memcpy(c, simt::current_slot().bytes, sizeof c);
}

template <class Half>
inline void multiply_m16n8k16(float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2], Half) {
  multiply<16>("mma.m16n8k16", c, x, y, [](uint32_t two, int half) { return widen(Half{uint16_t(two >> 16 * half)}); });
}
// The low 13 bits of an operand are not looked at.
inline void multiply_m16n8k8_tf32(float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2]) {
  multiply<8>("mma.m16n8k8.tf32", c, x, y, [](uint32_t bits, int) { return float_of_bits(bits & 0xffffe000u); });
}

// To nearest, ties away from zero.
inline uint32_t round_to_tf32(float x) {
  return std::isfinite(x) ? (bits_of_float(x) + 0x1000u) & 0xffffe000u : bits_of_float(x);
}

inline int64_t opaque(int64_t x) { return x; }

template <class T> inline T sum_over_warp(T x) {
  std::memcpy(simt::current_slot().bytes, &x, sizeof x);
  simt::warp_instruction("sum", [](simt::Warp &warp) {
    T sums[32];
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(&sums[lane], warp.slot[lane].bytes, sizeof(T));
    for (int half = 16; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane)
        sums[lane] += sums[lane + half];
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(warp.slot[lane].bytes, &sums[0], sizeof(T));
  });
  std::memcpy(&x, simt::current_slot().bytes, sizeof x);
  return x;
}

inline char *dynamic_shared() { return simt::block.shared; }

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void *,
                   Args... args) {
  const std::tuple<Parameters...> parameters(args...);
  const bool ok = simt::run_blocks(blocks, threads, shared_bytes, [&] { std::apply(kernel, parameters); });
  return ok ? cudaSuccess : cudaErrorLaunchFailure;
}

inline double product(double x, double y) { return x * y; } // built without contraction
inline double double_of_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline uint64_t bits_of_double(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

} // namespace gg
