// Outer-product fragments for the tensor cores: c (rows, cols) += x^T y, where x [tokens][rows] and y [tokens][cols]
// lie token-major in shared memory, as activations and output gradients come from a training step.
//
// Tokens<T>::step tokens go into one multiplication. A row fragment holds 16 rows of x, a column fragment 8 columns of
// y. In the accumulator fragment, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and 2 (l % 4) + 1.
#pragma once
#include "core/device.cuh"

namespace gg {

__device__ __forceinline__ int accumulator_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
__device__ __forceinline__ int accumulator_col(int lane, int e) { return lane % 4 * 2 + e % 2; }

// Elements added to each row in shared memory, so that the 8 rows (16-bit) or 4 x 8 elements (32-bit) which one
// instruction touches lie in different banks.
constexpr int bank_skew = 8;

// bfloat16 and float16: ldmatrix.trans turns tokens, which are rows in memory, into the inner index.
template <class T> struct Tokens {
  static constexpr int step = 16;
  struct Rows {
    uint32_t x[4];
  };
  struct Cols {
    uint32_t y[2];
  };

  static __device__ __forceinline__ Rows load_rows(const T *x, int stride, int lane) {
    Rows f;
    load_matrix_x4_trans(f.x, x + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    return f;
  }

  // Two neighbouring column fragments.
  static __device__ __forceinline__ void load_cols(Cols (&f)[2], const T *y, int stride, int lane) {
    uint32_t r[4];
    load_matrix_x4_trans(r, y + (lane % 8 + lane / 8 % 2 * 8) * stride + lane / 16 * 8);
    f[0] = {{r[0], r[1]}};
    f[1] = {{r[2], r[3]}};
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const Rows &rows, const Cols &cols) {
    multiply_m16n8k16(c, rows.x, cols.y, T{});
  }
};

// float32: x = high + low with both parts in TF32 (11 bits each), and x y = high high + high low + low high up to
// 2^-22. Tensor cores cut sums off instead of rounding them, a bias that would grow with the tokens: so every product
// starts from zero and is added to the accumulator by a float32 addition, which rounds.
template <> struct Tokens<float> {
  static constexpr int step = 8;
  struct Rows {
    uint32_t high[4], low[4];
  };
  struct Cols {
    uint32_t high[2], low[2];
  };

  static __device__ __forceinline__ void split(float x, uint32_t &high, uint32_t &low) {
    high = round_to_tf32(x);
    low = round_to_tf32(x - float_of_bits(high));
  }

  static __device__ __forceinline__ Rows load_rows(const float *x, int stride, int lane) {
    Rows f;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      split(x[(lane % 4 + e / 2 * 4) * stride + lane / 4 + e % 2 * 8], f.high[e], f.low[e]);
    return f;
  }

  static __device__ __forceinline__ void load_cols(Cols (&f)[2], const float *y, int stride, int lane) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      split(y[(lane % 4 + e % 2 * 4) * stride + lane / 4 + e / 2 * 8], f[e / 2].high[e % 2], f[e / 2].low[e % 2]);
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const Rows &rows, const Cols &cols) {
    float product[4] = {};
    multiply_m16n8k8_tf32(product, rows.low, cols.high);
    multiply_m16n8k8_tf32(product, rows.high, cols.low);
    multiply_m16n8k8_tf32(product, rows.high, cols.high);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      c[e] += product[e];
  }
};

} // namespace gg
