// A block's tile of b^T a, for a [tokens][cols] and b [tokens][rows]: windows of both copied into shared memory,
// products of what lies there added to accumulators in registers.
#pragma once
#include "core/mma.cuh"

namespace gg {

// A block's tile and the part of it that one warp holds. `resident` blocks share a multiprocessor.
template <int rows_, int cols_, int warp_rows_, int warp_cols_, int resident_> struct TileShape {
  static constexpr int rows = rows_, cols = cols_, resident = resident_;
  static constexpr int warp_rows = warp_rows_, warp_cols = warp_cols_, col_warps = cols / warp_cols;
  static constexpr int warps = rows / warp_rows * col_warps, threads = 32 * warps;
  static constexpr int row_fragments = warp_rows / 16, col_fragments = warp_cols / 8;
};

// A stage of the pipeline: some tokens of a's columns, then the same tokens of b's, which are the tile's rows.
template <class In, class Tile> struct Stage {
  static constexpr int tokens = 2 * Tokens<In>::step;
  static constexpr int a_stride = Tile::cols + bank_skew, b_stride = Tile::rows + bank_skew;
  static constexpr int elements = tokens * (a_stride + b_stride);
};

// The first `valid` of a chunk's elements, then zeros.
template <int bytes, class In> __device__ __forceinline__ void copy_chunk(In *to, const In *from, int valid) {
  if constexpr (bytes == 16)
    copy_async_16(to, from, valid * int(sizeof(In)));
  else if constexpr (bytes == 4)
    copy_async_4(to, from, valid * int(sizeof(In)));
  else
    *to = valid ? *from : In{};
}

template <int bytes, int width, int stride, int tokens, int threads, class In>
__device__ __forceinline__ void copy_chunks(In *to, const In *from, int64_t token_stride, int tokens_left,
                                            int cols_left) {
  constexpr int n = bytes / int(sizeof(In)), chunks = width / n;
  // Only the fast path is worth the registers of an unrolled loop's addresses.
#pragma unroll bytes == 16 ? tokens * chunks / threads : 1
  for (int i = int(threadIdx.x); i < tokens * chunks; i += threads) {
    const int token = i / chunks, col = i % chunks * n;
    const int valid = token < tokens_left ? int(most(0, least(n, cols_left - col))) : 0;
    const In *source = from + token * token_stride + col;
    In *target = to + token * stride + col;
    copy_chunk<bytes>(target, source, valid);
  }
}

// Tokens and columns past the end become zeros, which add nothing.
template <int width, int stride, int tokens, int threads, class In>
__device__ __forceinline__ void copy_window(int copy_bytes, In *to, const In *from, int64_t token_stride,
                                            int tokens_left, int cols_left) {
  if (copy_bytes == 16)
    copy_chunks<16, width, stride, tokens, threads>(to, from, token_stride, tokens_left, cols_left);
  else if (copy_bytes == 4)
    copy_chunks<4, width, stride, tokens, threads>(to, from, token_stride, tokens_left, cols_left);
  else if constexpr (sizeof(In) < 4)
    copy_chunks<sizeof(In), width, stride, tokens, threads>(to, from, token_stride, tokens_left, cols_left);
}

// The tokens from `a` and `b` on, of the tile's columns and rows, into a stage.
template <class Tile, class In>
__device__ __forceinline__ void copy_stage(In *to, int a_copy, const In *a, int64_t a_token, int b_copy, const In *b,
                                           int64_t b_token, int tokens_left, int cols_left, int rows_left) {
  using S = Stage<In, Tile>;
  copy_window<Tile::cols, S::a_stride, S::tokens, Tile::threads>(a_copy, to, a, a_token, tokens_left, cols_left);
  copy_window<Tile::rows, S::b_stride, S::tokens, Tile::threads>(b_copy, to + S::tokens * S::a_stride, b, b_token,
                                                                 tokens_left, rows_left);
}

// A warp's part of a tile in accumulator fragments, and where its elements lie in the tile.
template <class Tile> struct WarpTile {
  float value[Tile::row_fragments][Tile::col_fragments][4] = {};
  int lane, first_row, first_col;

  __device__ WarpTile()
      : lane(int(threadIdx.x) % 32), first_row(int(threadIdx.x) / 32 / Tile::col_warps * Tile::warp_rows),
        first_col(int(threadIdx.x) / 32 % Tile::col_warps * Tile::warp_cols) {}

  // Calls use(element, its right neighbour, row, column) for all of them. The barrier keeps the compiler from loading
  // all of D's tile ahead of its use, which would spill.
  template <class Use> __device__ __forceinline__ void for_each_pair(Use use) const { for_each_pair(*this, use); }
  template <class Use> __device__ __forceinline__ void for_each_pair(Use use) { for_each_pair(*this, use); }

  // Adds b^T a over the tokens of one stage.
  template <class In> __device__ __forceinline__ void add_product(const In *stage) {
    using S = Stage<In, Tile>;
    using T = Tokens<In>;
    const In *a = stage + first_col, *b = stage + S::tokens * S::a_stride + first_row;
#pragma unroll
    for (int token = 0; token < S::tokens; token += T::step) {
      typename T::Cols cols[Tile::col_fragments / 2][2];
#pragma unroll
      for (int j = 0; j < Tile::col_fragments / 2; ++j)
        T::load_cols(cols[j], a + token * S::a_stride + 16 * j, S::a_stride, lane);
#pragma unroll
      for (int i = 0; i < Tile::row_fragments; ++i) {
        const typename T::Rows rows = T::load_rows(b + token * S::b_stride + 16 * i, S::b_stride, lane);
#pragma unroll
        for (int j = 0; j < Tile::col_fragments; ++j)
          T::multiply(value[i][j], rows, cols[j / 2][j % 2]);
      }
    }
  }

private:
  template <class Self, class Use> static __device__ __forceinline__ void for_each_pair(Self &self, Use use) {
#pragma unroll
    for (int i = 0; i < Tile::row_fragments; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::col_fragments; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          use(self.value[i][j][e], self.value[i][j][e + 1], self.first_row + 16 * i + accumulator_row(self.lane, e),
              self.first_col + 8 * j + accumulator_col(self.lane, e));
      __syncwarp();
    }
  }
};

} // namespace gg
