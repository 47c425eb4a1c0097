// The device primitives of csrc/core/device.cuh, executed by simt.h. Fragment layouts are those of the PTX ISA ("Matrix
// Fragments for mma.m16n8k8 / m16n8k16", "ldmatrix"), written down here a second time and on purpose not shared.
#pragma once
#include "core/array.h"
#include "simt.h"
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __syncthreads() simt::sync_threads()
#define __syncwarp() simt::warp_instruction("syncwarp", simt::Site::current(), [](simt::Warp &) {})
#define __threadfence() simt::let_others_run()
#define threadIdx (simt::current().thread)
#define blockIdx (simt::block.index)
#define blockDim (simt::block.size)
#define gridDim (simt::block.grid)

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
inline cudaError_t cudaMemset2DAsync(void *to, size_t pitch, int value, size_t width, size_t height,
                                     cudaStream_t stream) {
  if (!simt::is_callers_stream(stream))
    return cudaErrorLaunchFailure;
  for (size_t row = 0; row < height; ++row)
    std::memset(static_cast<char *>(to) + row * pitch, value, width);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset2DAsync(to, bytes, value, bytes, 1, stream);
}
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (!simt::is_callers_stream(stream))
    return cudaErrorLaunchFailure;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __popcll(uint64_t x) { return std::popcount(x); }
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __ffsll(uint64_t x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline int __clzll(uint64_t x) { return std::countl_zero(x); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return uint32_t(uint64_t(x) * y >> 32); }
inline uint64_t __umul64hi(uint64_t x, uint64_t y) { return uint64_t((unsigned __int128)(x)*y >> 64); }
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }

namespace gg {

// Where a warp-wide instruction stands in the source.
using simt::Site;

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

inline double widen(double x) { return x; }

template <class T> inline T narrow(float x) { return T(x); }
template <> inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = bits_of_float(x);
  return {uint16_t(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 narrow<f16>(float x) { return {std::bit_cast<uint16_t>(_Float16(x))}; }

template <class T> inline float2 load_pair(const T *p) {
  simt::require(reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T)) == 0, "misaligned pair");
  return {widen(p[0]), widen(p[1])};
}

template <class T> struct alignas(16) Vector {
  static constexpr int size = 16 / int(sizeof(T));
  T at[size];
};
template <class T> inline Vector<T> load_vector(const T *p) {
  simt::require(reinterpret_cast<uintptr_t>(p) % 16 == 0, "misaligned vector");
  Vector<T> v;
  std::memcpy(&v, p, 16);
  return v;
}
template <class T> inline Vector<T> load_vector_once(const T *p) {
  simt::require(!simt::is_shared(p), "a read past the caches of shared memory");
  return load_vector(p);
}
template <class T> inline void store_vector(T *p, const Vector<T> &v) {
  simt::require(reinterpret_cast<uintptr_t>(p) % 16 == 0, "misaligned vector");
  std::memcpy(p, &v, 16);
}

inline void copy_async_16(void *to, const void *from, int valid) { simt::copy_async(to, from, 16, valid); }
inline void copy_async_4(void *to, const void *from, int valid) { simt::copy_async(to, from, 4, valid); }
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int pending> inline void copy_async_wait() { simt::copy_async_wait(pending); }

// Lane l gets of each matrix the elements (l / 4, 2 (l % 4)) and its right neighbour, or those of the transposed one.
inline void load_matrices(const char *name, Site at, uint32_t (&r)[4], const void *row, bool transposed) {
  simt::require_shared(row, 16, 16);
  std::memcpy(simt::current_slot().bytes, &row, sizeof row);
  simt::warp_instruction(name, at, [&](simt::Warp &warp) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const void *from;
      std::memcpy(&from, warp.slot[lane].bytes, sizeof from);
      std::memcpy(matrix[lane / 8][lane % 8], from, 16);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int half = 0; half < 2; ++half) {
          const int i = lane / 4, j = lane % 4 * 2 + half;
          std::memcpy(warp.slot[lane].bytes + 4 * m + 2 * half, transposed ? &matrix[m][j][i] : &matrix[m][i][j], 2);
        }
  });
  std::memcpy(r, simt::current_slot().bytes, 16);
}
inline void load_matrix_x4(uint32_t (&r)[4], const void *row, Site at = Site::current()) {
  load_matrices("ldmatrix.x4", at, r, row, false);
}
inline void load_matrix_x4_trans(uint32_t (&r)[4], const void *row, Site at = Site::current()) {
  load_matrices("ldmatrix.x4.trans", at, r, row, true);
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
inline void multiply(const char *name, Site at, float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2],
                     Unpack unpack) {
  MultiplyOperands own;
  std::memcpy(own.x, x, sizeof x);
  std::memcpy(own.y, y, sizeof y);
  std::memcpy(own.c, c, sizeof c);
  std::memcpy(simt::current_slot().bytes, &own, sizeof own);
  simt::warp_instruction(name, at, [&](simt::Warp &warp) {
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
inline void multiply_m16n8k16(float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2], Half,
                              Site at = Site::current()) {
  multiply<16>("mma.m16n8k16", at, c, x, y,
               [](uint32_t two, int half) { return widen(Half{uint16_t(two >> 16 * half)}); });
}
// The low 13 bits of an operand are not looked at.
inline void multiply_m16n8k8_tf32(float (&c)[4], const uint32_t (&x)[4], const uint32_t (&y)[2],
                                  Site at = Site::current()) {
  multiply<8>("mma.m16n8k8.tf32", at, c, x, y, [](uint32_t bits, int) { return float_of_bits(bits & 0xffffe000u); });
}

// To nearest, ties away from zero.
inline uint32_t round_to_tf32(float x) {
  return std::isfinite(x) ? (bits_of_float(x) + 0x1000u) & 0xffffe000u : bits_of_float(x);
}

inline int64_t opaque(int64_t x) { return x; }

// Every lane gets the value of the lane that from(lane) names.
template <class T, class From> inline T shuffle(const char *name, Site at, const T &x, From from) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) + 4 <= sizeof(simt::Slot) && std::is_trivially_copyable_v<T>,
                "shuffles move whole words");
  simt::Slot &slot = simt::current_slot();
  const int source = from(simt::current().lane);
  simt::require(source >= 0 && source < simt::warp_size, "a shuffle from a lane that is not there");
  std::memcpy(slot.bytes, &x, sizeof(T));
  std::memcpy(slot.bytes + sizeof(T), &source, 4);
  simt::warp_instruction(name, at, [](simt::Warp &warp) {
    simt::Slot given[simt::warp_size];
    std::memcpy(given, warp.slot, sizeof given);
    for (int lane = 0; lane < simt::warp_size; ++lane) {
      int source;
      std::memcpy(&source, given[lane].bytes + sizeof(T), 4);
      std::memcpy(warp.slot[lane].bytes, given[source].bytes, sizeof(T));
    }
  });
  T y;
  std::memcpy(&y, slot.bytes, sizeof(T));
  return y;
}
template <class T> inline T shuffle_down(const T &x, int distance, Site at = Site::current()) {
  return shuffle("shuffle_down", at, x, [=](int lane) { return lane + distance < 32 ? lane + distance : lane; });
}
template <class T> inline T shuffle_xor(const T &x, int mask, Site at = Site::current()) {
  return shuffle("shuffle_xor", at, x, [=](int lane) { return lane ^ mask; });
}
template <class T> inline T broadcast(const T &x, int from, Site at = Site::current()) {
  return shuffle("broadcast", at, x, [=](int) { return from; });
}
inline uint32_t vote(bool is, Site at = Site::current()) {
  simt::Slot &slot = simt::current_slot();
  slot.bytes[0] = is;
  simt::warp_instruction("vote", at, [](simt::Warp &warp) {
    uint32_t bits = 0;
    for (int lane = 0; lane < simt::warp_size; ++lane)
      bits |= uint32_t(warp.slot[lane].bytes[0]) << lane;
    for (simt::Slot &each : warp.slot)
      std::memcpy(each.bytes, &bits, 4);
  });
  uint32_t bits;
  std::memcpy(&bits, slot.bytes, 4);
  return bits;
}

// One instruction for all five halvings: the order of the card's, at a fifth of the price.
template <class T, class Merge> inline T over_warp(const char *name, Site at, T x, Merge merge) {
  static_assert(sizeof(T) <= sizeof(simt::Slot));
  std::memcpy(simt::current_slot().bytes, &x, sizeof x);
  simt::warp_instruction(name, at, [&](simt::Warp &warp) {
    T values[simt::warp_size];
    for (int lane = 0; lane < simt::warp_size; ++lane)
      std::memcpy(&values[lane], warp.slot[lane].bytes, sizeof(T));
    for (int half = simt::warp_size / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane)
        values[lane] = merge(values[lane], values[lane + half]);
    for (simt::Slot &each : warp.slot)
      std::memcpy(each.bytes, &values[0], sizeof(T));
  });
  std::memcpy(&x, simt::current_slot().bytes, sizeof x);
  return x;
}
template <class T> inline T sum_over_warp(T x, Site at = Site::current()) {
  return over_warp("sum", at, x, [](T y, T z) { return y + z; });
}
template <class T> inline T max_over_warp(T x, Site at = Site::current()) {
  return over_warp("max", at, x, [](T y, T z) { return y < z || y != y ? z : y; });
}
template <class T, class Merge> inline T merge_over_warp(T x, Merge merge, Site at = Site::current()) {
  return over_warp("merge", at, x, merge);
}

// Others run in between, so that what depends on who comes first differs from seed to seed.
template <class T, class Change> inline T atomic(T *at, Change change) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || std::is_same_v<T, uint64_t>), "no such atomic");
  simt::require(reinterpret_cast<uintptr_t>(at) % sizeof(T) == 0, "misaligned atomic");
  simt::let_others_run();
  const T before = *at;
  *at = change(before);
  return before;
}
template <class T> inline T atomic_add(T *at, T x) {
  return atomic(at, [=](T old) { return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(x)); });
}
template <class T> inline T atomic_max(T *at, T x) {
  return atomic(at, [=](T old) { return old < x ? x : old; });
}
template <class T> inline T atomic_min(T *at, T x) {
  return atomic(at, [=](T old) { return x < old ? x : old; });
}
template <class T> inline T atomic_swap_if(T *at, T expected, T x) {
  return atomic(at, [=](T old) { return old == expected ? x : old; });
}

template <class T> inline T narrow(double x) { return T(x); }
inline float smaller_or_nan(float x, float y) { return y > x ? x : y; } // y is the unknown one
inline float larger_or_nan(float x, float y) { return y < x ? x : y; }
inline double smaller_or_nan(double x, double y) { return y > x ? x : y; }
inline double larger_or_nan(double x, double y) { return y < x ? x : y; }
// As far off as the instruction may be, up for one number and down for the next.
inline float exp2_fast(float x) {
  const double y = std::exp2(double(x)) * (1 + (bits_of_float(x) & 1 ? 0x1p-22 : -0x1p-22));
  return std::fabs(y) < 0x1p-126 ? 0 : float(y);
}
inline float reciprocal_fast(float x) {
  return float(1 / double(x) * (1 + (bits_of_float(x) & 1 ? 0x1p-23 : -0x1p-23)));
}

inline char *dynamic_shared() { return simt::block.shared; }

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void *stream,
                   Args... args) {
  if (!simt::is_callers_stream(stream))
    return cudaErrorLaunchFailure;
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

inline uint32_t match_over_warp(uint32_t x, Site at = Site::current()) {
  std::memcpy(simt::current_slot().bytes, &x, sizeof x);
  simt::warp_instruction("match", at, [](simt::Warp &warp) {
    uint32_t given[32], same[32] = {};
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(&given[lane], warp.slot[lane].bytes, 4);
    for (int lane = 0; lane < 32; ++lane)
      for (int other = 0; other < 32; ++other)
        same[lane] |= uint32_t(given[lane] == given[other]) << other;
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(warp.slot[lane].bytes, &same[lane], 4);
  });
  std::memcpy(&x, simt::current_slot().bytes, sizeof x);
  return x;
}

} // namespace gg
