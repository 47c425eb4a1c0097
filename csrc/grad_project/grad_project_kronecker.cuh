// Kronecker projections on tensor cores: tokens times P^T, features in spans over the blocks, then one small product
// per sample.
#pragma once
#include "core/inner.cuh"
#include "core/launch.cuh"
#include "core/log.h"
#include "grad_project/grad_project.h"
#include "grad_project/grad_project_draw.cuh"
#include <cmath>

namespace gg {
namespace {

using ProjectTile = TileShape<64, 64, 32, 32, 2>;
using OuterTile = TileShape<32, 32, 16, 16, 4>; // small, because a sample's tokens are never split over blocks

// One side of the layer: tokens (all samples' numbered through) times a matrix's rows.
struct Side {
  const void *tokens;
  int64_t sample_stride, token_stride, features;
  GradProject::Matrix given;
  int64_t purpose, k, k_stride; // k_stride: k in whole 16 bytes
  int64_t k_tiles, spans;       // of at most `span` features, by different blocks
  const void *matrix;           // (k, features), as the product takes it: given, or made in the workspace
  int64_t matrix_row;
  int tokens_copy, matrix_copy; // bytes per copy that alignment allows: 16, 4 or one element
  float *projected;             // [spans][samples * tokens][k_stride]
};

struct Kronecker {
  Side side[2]; // b's with P_out, a's with P_in
  int64_t rows, row_tiles, span;
};

template <class M> __device__ __forceinline__ M sign_of(bool minus);
template <> __device__ __forceinline__ float sign_of<float>(bool minus) { return minus ? -1.f : 1.f; }
template <> __device__ __forceinline__ bf16 sign_of<bf16>(bool minus) { return {uint16_t(minus ? 0xbf80 : 0x3f80)}; }
template <> __device__ __forceinline__ f16 sign_of<f16>(bool minus) { return {uint16_t(minus ? 0xbc00 : 0x3c00)}; }

// Two independent standard normals (Box and Muller). The angle is within an eighth of a turn of a quarter, exactly, so
// that the Taylor series of cosine and sine end after 8 terms.
__device__ __forceinline__ float2 normals(uint64_t w0, uint64_t w1) {
  const uint64_t quarter = (w1 + (1u << 29)) >> 30;
  const double x = (double(w1) * 0x1p-30 - double(quarter)) * 1.57079632679489661923, x2 = x * x;
  double cosine = 1, sine = 1;
#pragma unroll
  for (int n = 16; n > 0; n -= 2) {
    cosine = 1 - cosine * x2 * (1.0 / (n * (n - 1)));
    sine = 1 - sine * x2 * (1.0 / (n * (n + 1)));
  }
  sine *= x;
  const double radius = sqrt(-2 * log_same_bits((double(w0) + 0.5) * 0x1p-32));
  const double c = quarter & 1 ? sine : cosine, s = quarter & 1 ? cosine : sine; // a quarter turn exchanges them
  return {float((quarter + 1) & 2 ? -radius * c : radius * c), float(quarter & 2 ? -radius * s : radius * s)};
}

// A matrix as the product takes it, where it is not given so: drawn, or a half-width one in float32. A thread makes the
// rows of one Philox counter in one column.
template <class In, class M> __global__ void __launch_bounds__(threads) grad_project_matrix(GradProject s, Side side) {
  const bool signs = s.kind == GradProject::Kind::rademacher;
  const int rows = signs && !side.given.data ? 128 : 4;
  const int64_t number = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int64_t col = number % side.features, group = number / side.features, row = group * rows;
  if (row >= side.k)
    return;
  const int count = int(least(rows, side.k - row));
  M *to = static_cast<M *>(const_cast<void *>(side.matrix)) + row * side.matrix_row + col;
  if constexpr (sizeof(M) == 4) {
    if (side.given.data) {
      const In *from = static_cast<const In *>(side.given.data) + row * side.given.row + col;
      for (int r = 0; r < count; ++r)
        to[r * side.matrix_row] = widen(from[r * side.given.row]);
      return;
    }
    if (!signs) {
      const Words words(s, col, group, side.purpose);
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const float2 pair = normals(words.at[r], words.at[r + 1]);
        if (r < count)
          to[r * side.matrix_row] = pair.x;
        if (r + 1 < count)
          to[(r + 1) * side.matrix_row] = pair.y;
      }
      return;
    }
  }
  const Words words(s, col, group, side.purpose);
#pragma unroll
  for (int word = 0; word < 4; ++word)
    for (int r = 32 * word; r < least(count, 32 * word + 32); ++r)
      to[r * side.matrix_row] = sign_of<M>(words.at[word] >> r % 32 & 1);
}

// A tile of tokens by a matrix's rows, over a span of features.
template <class In, class M>
__global__ void __launch_bounds__(ProjectTile::threads, ProjectTile::resident)
    grad_project_tokens(GradProject s, Kronecker at) {
  using Tile = ProjectTile;
  using S = InnerStage<In, M, Tile>;
  const int64_t first_of_a = at.row_tiles * at.side[0].k_tiles * at.side[0].spans;
  const bool of_a = blockIdx.x >= first_of_a;
  const Side &side = at.side[of_a];
  const int64_t number = blockIdx.x - (of_a ? first_of_a : 0);
  const int64_t col = number % side.k_tiles * Tile::cols, row = number / side.k_tiles % at.row_tiles * Tile::rows;
  const int64_t span = number / side.k_tiles / at.row_tiles, feature = span * at.span;
  const int features = int(least(at.span, side.features - feature)), steps = int(ceil_div(features, S::features));
  const int rows_left = int(least(Tile::rows, at.rows - row)), cols_left = int(least(Tile::cols, side.k - col));

  char *pipeline = dynamic_shared();
  int64_t *row_offsets = reinterpret_cast<int64_t *>(pipeline + stages * S::bytes),
          *col_offsets = row_offsets + Tile::rows;
  for (int i = int(threadIdx.x); i < Tile::rows; i += Tile::threads) {
    const int64_t token = row + least(i, rows_left - 1);
    row_offsets[i] = token / s.tokens * side.sample_stride + token % s.tokens * side.token_stride;
    col_offsets[i] = (col + least(i, cols_left - 1)) * side.matrix_row;
  }
  __syncthreads(); // the offsets are there

  const In *x = static_cast<const In *>(side.tokens) + feature;
  const M *y = static_cast<const M *>(side.matrix) + feature;
  int ahead = 0;
  const auto fetch = [&](int slot) {
    if (ahead < steps) {
      char *to = pipeline + slot * S::bytes;
      const int from = ahead * S::features;
      copy_rows<Tile::rows, S::features, S::x_stride, Tile::threads>(side.tokens_copy, reinterpret_cast<In *>(to),
                                                                     x + from, row_offsets, rows_left, features - from);
      copy_rows<Tile::cols, S::features, S::y_stride, Tile::threads>(
          side.matrix_copy, reinterpret_cast<M *>(to + S::y_offset), y + from, col_offsets, cols_left, features - from);
      ++ahead;
    }
    copy_async_commit(); // an empty group too: the waits below count groups
  };
#pragma unroll 1
  for (int slot = 0; slot < stages - 1; ++slot)
    fetch(slot);

  WarpTile<Tile> projected;
  for (int step = 0, slot = 0; step < steps; ++step, slot = (slot + 1) % stages) {
    copy_async_wait<stages - 2>();
    __syncthreads(); // everyone's copies of this slot have landed, and everyone is done with the slot before it
    fetch((slot + stages - 1) % stages);
    const char *stage = pipeline + slot * S::bytes;
    add_inner_product(projected, reinterpret_cast<const In *>(stage), reinterpret_cast<const M *>(stage + S::y_offset));
  }
  float *to = side.projected + (span * at.rows + row) * side.k_stride + col;
  projected.for_each_pair([&](float x, float y, int r, int c) {
    if (r < rows_left && c < cols_left)
      to[r * side.k_stride + c] = x;
    if (r < rows_left && c + 1 < cols_left)
      to[r * side.k_stride + c + 1] = y;
  });
}

// Adds up the spans, in their order, into the first.
__global__ void __launch_bounds__(threads) grad_project_sum_spans(Side side, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= count)
    return;
  float sum = 0;
  for (int64_t span = 0; span < side.spans; ++span)
    sum += side.projected[span * count + i];
  side.projected[i] = sum;
}

// A tile of one sample's product of projected tokens.
__global__ void __launch_bounds__(OuterTile::threads, OuterTile::resident)
    grad_project_outer(GradProject s, Kronecker at, float scale) {
  using Tile = OuterTile;
  using S = Stage<float, Tile>;
  const Side &left = at.side[0], &right = at.side[1];
  const int64_t col_tiles = ceil_div(right.k, Tile::cols), row_tiles = ceil_div(left.k, Tile::rows);
  const int64_t col = blockIdx.x % col_tiles * Tile::cols, row = blockIdx.x / col_tiles % row_tiles * Tile::rows;
  const int64_t sample = blockIdx.x / col_tiles / row_tiles;
  const int rows_left = int(least(Tile::rows, left.k - row)), cols_left = int(least(Tile::cols, right.k - col));
  const float *a = right.projected + sample * s.tokens * right.k_stride + col;
  const float *b = left.projected + sample * s.tokens * left.k_stride + row;
  const int tokens = int(s.tokens);

  float *pipeline = reinterpret_cast<float *>(dynamic_shared());
  int ahead = 0;
  const auto fetch = [&](int slot) {
    if (ahead < tokens) {
      float *to = pipeline + slot * S::elements;
      copy_window<Tile::cols, S::a_stride, S::tokens, Tile::threads>(16, to, a + ahead * right.k_stride, right.k_stride,
                                                                     tokens - ahead, cols_left);
      copy_window<Tile::rows, S::b_stride, S::tokens, Tile::threads>(
          16, to + S::tokens * S::a_stride, b + ahead * left.k_stride, left.k_stride, tokens - ahead, rows_left);
      ahead += S::tokens;
    }
    copy_async_commit(); // an empty group too: the waits below count groups
  };
#pragma unroll 1
  for (int slot = 0; slot < stages - 1; ++slot)
    fetch(slot);

  WarpTile<Tile> sum;
  for (int token = 0, slot = 0; token < tokens; token += S::tokens, slot = (slot + 1) % stages) {
    copy_async_wait<stages - 2>();
    __syncthreads(); // everyone's copies of this slot have landed, and everyone is done with the slot before it
    fetch((slot + stages - 1) % stages);
    sum.add_product(pipeline + slot * S::elements);
  }
  float *out = static_cast<float *>(s.out) + (sample * left.k + row) * right.k + col;
  sum.for_each_pair([&](float x, float y, int r, int c) {
    if (r < rows_left && c < cols_left)
      out[r * right.k + c] = x * scale;
    if (r < rows_left && c + 1 < cols_left)
      out[r * right.k + c + 1] = y * scale;
  });
}

// ---------------------------------------------------------------------------------------------------------------------

int64_t whole_16_bytes(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

// Drawn normals and given float32 matrices need products of float32 with the tokens' type; both sides then take them.
DType matrix_type(const GradProject &s) {
  bool wide = false;
  for (const GradProject::Matrix &given : {s.P_out, s.P_in})
    wide = wide || (given.data ? given.dtype == DType::f32 : s.kind == GradProject::Kind::gaussian);
  return wide ? DType::f32 : s.dtype;
}

bool is_made(const GradProject &s, const Side &side) { return !side.given.data || side.given.dtype != matrix_type(s); }

// `workspace` may be null, to learn how many bytes are needed.
Kronecker plan_kronecker(const GradProject &s, char *workspace, int64_t &bytes) {
  Kronecker at{};
  at.rows = s.samples * s.tokens, at.row_tiles = ceil_div(at.rows, ProjectTile::rows);
  at.side[0] = {s.b, s.b_sample, s.b_token, s.p, s.P_out, 0, s.k_out};
  at.side[1] = {s.a, s.a_sample, s.a_token, s.d, s.P_in, 1, s.k_in};
  int64_t work = 0;
  for (Side &side : at.side) {
    side.k_stride = ceil_div(side.k, 4) * 4, side.k_tiles = ceil_div(side.k, ProjectTile::cols);
    work += at.row_tiles * side.k_tiles * side.features;
  }
  constexpr int64_t least_span = 256, step = 64;
  at.span = ceil_div(most(least_span, ceil_div(work, wanted_blocks)), step) * step;
  const int64_t element = size_of(matrix_type(s));
  bytes = 0;
  for (Side &side : at.side) {
    side.spans = ceil_div(side.features, at.span);
    side.projected = reinterpret_cast<float *>(workspace + bytes);
    bytes += side.spans * at.rows * side.k_stride * int64_t(sizeof(float));
    side.matrix = side.given.data, side.matrix_row = side.given.row;
    if (is_made(s, side)) {
      side.matrix_row = whole_16_bytes(side.features * element) / element;
      side.matrix = workspace + bytes;
      bytes += side.k * side.matrix_row * element;
    }
    side.tokens_copy = copy_bytes(side.tokens, side.sample_stride, side.token_stride, size_of(s.dtype));
    side.matrix_copy = copy_bytes(side.matrix, side.matrix_row, 0, element);
  }
  return at;
}

template <class In, class M> cudaError_t run_kronecker(const GradProject &s, const Kronecker &at, void *stream) {
  cudaError_t error = cudaSuccess;
  for (const Side &side : at.side)
    if (error == cudaSuccess && is_made(s, side)) {
      const int64_t rows = s.kind == GradProject::Kind::rademacher && !side.given.data ? 128 : 4;
      error = launch(grad_project_matrix<In, M>, ceil_div(ceil_div(side.k, rows) * side.features, threads), threads, 0,
                     stream, s, side);
    }
  using S = InnerStage<In, M, ProjectTile>;
  const int64_t blocks = at.row_tiles * (at.side[0].k_tiles * at.side[0].spans + at.side[1].k_tiles * at.side[1].spans);
  constexpr int64_t offsets = (ProjectTile::rows + ProjectTile::cols) * int64_t(sizeof(int64_t));
  if (error == cudaSuccess)
    error =
        launch(grad_project_tokens<In, M>, blocks, ProjectTile::threads, stages * S::bytes + offsets, stream, s, at);
  for (const Side &side : at.side)
    if (error == cudaSuccess && side.spans > 1) {
      const int64_t count = at.rows * side.k_stride;
      error = launch(grad_project_sum_spans, ceil_div(count, threads), threads, 0, stream, side, count);
    }
  const double made = (s.P_out.data ? 1.0 : double(s.k_out)) * (s.P_in.data ? 1.0 : double(s.k_in));
  const int64_t tiles = ceil_div(s.k_out, OuterTile::rows) * ceil_div(s.k_in, OuterTile::cols);
  constexpr int64_t shared = stages * Stage<float, OuterTile>::elements * int64_t(sizeof(float));
  if (error == cudaSuccess)
    error = launch(grad_project_outer, s.samples * tiles, OuterTile::threads, shared, stream, s, at,
                   float(1 / std::sqrt(made)));
  return error;
}

template <class In> cudaError_t run_kronecker(const GradProject &s, char *workspace, void *stream) {
  int64_t bytes = 0;
  const Kronecker at = plan_kronecker(s, workspace, bytes);
  const int64_t outer = s.samples * ceil_div(s.k_out, OuterTile::rows) * ceil_div(s.k_in, OuterTile::cols);
  if (most(most(at.rows, outer), most(s.p, s.d)) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  return matrix_type(s) == s.dtype ? run_kronecker<In, In>(s, at, stream) : run_kronecker<In, float>(s, at, stream);
}

} // namespace
} // namespace gg
