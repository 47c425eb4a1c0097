// A block's tile of x y^T, for x [row][feature] and y [column][feature]: products over the features, which lie side by
// side in memory. So rows go to the tensor cores as they are, 32 bytes of each at a time, whatever the type: ldmatrix
// gives a lane the word of row lane / 4 that it owes to the product, two half-width features or one of 32 bits.
#pragma once
#include "core/tile.cuh"
#include <type_traits>

namespace gg {

// x and y of one type.
template <class In> struct FeaturesOfOneType {
  using T = Tokens<In>;
  using Rows = typename T::Rows;
  using Cols = typename T::Cols;
  static constexpr int step = T::step, per_stage = 2 * step;
  static constexpr int x_skew = 16 / int(sizeof(In)),
                       y_skew = x_skew; // rows 80 bytes apart: 8 of them in different banks

  static __device__ __forceinline__ Rows load_rows(const In *x, int stride, int lane) {
    uint32_t r[4];
    load_matrix_x4(r, x + (lane % 8 + lane / 8 % 2 * 8) * stride + lane / 16 * (step / 2));
    return rows_of(r, In{});
  }

  // Two neighbouring column fragments.
  static __device__ __forceinline__ void load_cols(Cols (&f)[2], const In *y, int stride, int lane) {
    uint32_t r[4];
    load_matrix_x4(r, y + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * (step / 2));
    cols_of(f, r, In{});
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const Rows &rows, const Cols &cols) {
    T::multiply(c, rows, cols);
  }

private:
  template <class Half> static __device__ __forceinline__ Rows rows_of(const uint32_t (&r)[4], Half) {
    return {{r[0], r[1], r[2], r[3]}};
  }
  static __device__ __forceinline__ Rows rows_of(const uint32_t (&r)[4], float) {
    Rows f;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      T::split(float_of_bits(r[e]), f.high[e], f.low[e]);
    return f;
  }
  template <class Half> static __device__ __forceinline__ void cols_of(Cols (&f)[2], const uint32_t (&r)[4], Half) {
    f[0] = {{r[0], r[1]}};
    f[1] = {{r[2], r[3]}};
  }
  static __device__ __forceinline__ void cols_of(Cols (&f)[2], const uint32_t (&r)[4], float) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      T::split(float_of_bits(r[e]), f[e / 2].high[e % 2], f[e / 2].low[e % 2]);
  }
};

// Half-width x and float32 y: a half is exact in TF32, so that two products suffice, x high + x low. A word of x holds
// the features 2q and 2q + 1 of a lane's q = lane % 4, which the product knows as q and q + 4; y is read to match.
template <class Half> struct FeaturesOfTwoTypes {
  struct Rows {
    uint32_t x[2][4];
  };
  struct Cols {
    uint32_t high[2][2], low[2][2];
  };
  static constexpr int step = 16, per_stage = 2 * step;
  static constexpr int x_skew = 8, y_skew = 8; // y's rows are 160 bytes apart: the pairs of 4 rows in different banks

  static __device__ __forceinline__ Rows load_rows(const Half *x, int stride, int lane) {
    uint32_t r[4];
    load_matrix_x4(r, x + (lane % 8 + lane / 8 % 2 * 8) * stride + lane / 16 * 8);
    Rows f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      f.x[e / 2][e % 2] = bits_of_float(widen(Half{uint16_t(r[e])}));
      f.x[e / 2][e % 2 + 2] = bits_of_float(widen(Half{uint16_t(r[e] >> 16)}));
    }
    return f;
  }

  static __device__ __forceinline__ void load_cols(Cols (&f)[2], const float *y, int stride, int lane) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float2 pair = load_pair(y + (lane / 4 + 8 * c) * stride + 8 * k + lane % 4 * 2);
        Tokens<float>::split(pair.x, f[c].high[k][0], f[c].low[k][0]);
        Tokens<float>::split(pair.y, f[c].high[k][1], f[c].low[k][1]);
      }
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const Rows &rows, const Cols &cols) {
    float product[4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      multiply_m16n8k8_tf32(product, rows.x[k], cols.low[k]);
      multiply_m16n8k8_tf32(product, rows.x[k], cols.high[k]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      c[e] += product[e];
  }
};

template <class X, class Y>
using Features = std::conditional_t<std::is_same_v<X, Y>, FeaturesOfOneType<X>, FeaturesOfTwoTypes<X>>;

// A stage of the pipeline: some features of the tile's rows, then the same features of its columns.
template <class X, class Y, class Tile> struct InnerStage {
  using F = Features<X, Y>;
  static constexpr int features = F::per_stage;
  static constexpr int x_stride = features + F::x_skew, y_stride = features + F::y_skew;
  static constexpr int y_offset = Tile::rows * x_stride * int(sizeof(X)); // in bytes, like the next
  static constexpr int bytes = y_offset + Tile::cols * y_stride * int(sizeof(Y));
};

template <int bytes, int rows, int features, int stride, int threads, class In>
__device__ __forceinline__ void copy_row_chunks(In *to, const In *from, const int64_t *offset, int rows_left,
                                                int features_left) {
  constexpr int n = bytes / int(sizeof(In)), chunks = features / n;
#pragma unroll bytes == 16 ? rows * chunks / threads : 1
  for (int i = int(threadIdx.x); i < rows * chunks; i += threads) {
    const int row = i / chunks, feature = i % chunks * n;
    const int valid = row < rows_left ? int(most(0, least(n, features_left - feature))) : 0;
    const In *source = from + offset[row] + feature;
    In *target = to + row * stride + feature;
    copy_chunk<bytes>(target, source, valid);
  }
}

// Copies features of the rows that begin at from + offset[row]; rows and features past the end become zeros. `offset`
// lies in shared memory.
template <int rows, int features, int stride, int threads, class In>
__device__ __forceinline__ void copy_rows(int copy_bytes, In *to, const In *from, const int64_t *offset, int rows_left,
                                          int features_left) {
  if (copy_bytes == 16)
    copy_row_chunks<16, rows, features, stride, threads>(to, from, offset, rows_left, features_left);
  else if (copy_bytes == 4)
    copy_row_chunks<4, rows, features, stride, threads>(to, from, offset, rows_left, features_left);
  else if constexpr (sizeof(In) < 4)
    copy_row_chunks<sizeof(In), rows, features, stride, threads>(to, from, offset, rows_left, features_left);
}

// Adds x y^T over the features of one stage to a warp's part of the tile.
template <class X, class Y, class Tile>
__device__ __forceinline__ void add_inner_product(WarpTile<Tile> &tile, const X *x, const Y *y) {
  using S = InnerStage<X, Y, Tile>;
  using F = Features<X, Y>;
  x += tile.first_row * S::x_stride;
  y += tile.first_col * S::y_stride;
#pragma unroll
  for (int feature = 0; feature < S::features; feature += F::step) {
    typename F::Cols cols[Tile::col_fragments / 2][2];
#pragma unroll
    for (int j = 0; j < Tile::col_fragments / 2; ++j)
      F::load_cols(cols[j], y + 16 * j * S::y_stride + feature, S::y_stride, tile.lane);
#pragma unroll
    for (int i = 0; i < Tile::row_fragments; ++i) {
      const typename F::Rows rows = F::load_rows(x + 16 * i * S::x_stride + feature, S::x_stride, tile.lane);
#pragma unroll
      for (int j = 0; j < Tile::col_fragments; ++j)
        F::multiply(tile.value[i][j], rows, cols[j / 2][j % 2]);
    }
  }
}

} // namespace gg
