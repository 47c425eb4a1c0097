// grad_gram on tensor cores: a block owns a tile of tokens by tokens, whose two scores are products over d and over p.
// Both tiles stay in registers, are multiplied element by element and summed by samples: of T x T2 nothing is stored
// but a number per tile and pair. Tokens of all samples are numbered through, so that short samples share tiles. Norms
// of few tokens have a kernel of their own. See docs/gpu/grad_gram.md.
#include "core/inner.cuh"
#include "core/launch.cuh"
#include "grad_gram/grad_gram.h"

namespace gg {
namespace {

using LargeTile = TileShape<128, 128, 64, 32, 1>; // 128 of its 255 registers per thread are the two tiles
using SmallTile = TileShape<64, 64, 32, 32, 2>;

constexpr int stages = 4;

// How the work is cut; a function of the shapes alone, and so are the bits of the results.
struct Plan {
  int64_t tile;                   // rows and columns of a tile
  int64_t row_tiles, col_tiles;   // of all tokens of the left and of the right side
  int64_t row_pieces, col_pieces; // how many tiles a sample's tokens may lie in
  int64_t blocks;
};

// Bytes per copy that an operand's alignment allows: 16, 4 or one element.
struct SideCopy {
  int a, b;
};

struct Launch {
  Plan plan;
  SideCopy left, right;
  double *partials; // [pairs][row pieces][column pieces], or null where each pair of samples lies in one tile
};

// A pair of tiles, numbered among all tokens.
struct TilePair {
  int64_t row, col;
};

// The b-th pair of tiles; row <= col where the result is symmetric. False for the few that only fill the grid.
__device__ __forceinline__ bool find_pair(const GradGram &s, const Plan &plan, int64_t b, TilePair &pair) {
  if (!s.symmetric) {
    pair = {b / plan.col_tiles, b % plan.col_tiles};
    return true;
  }
  if (s.diagonal) { // as many as the sample that ends last in the row of tiles still lies in
    pair.row = b / plan.row_pieces;
    pair.col = pair.row + b % plan.row_pieces;
    const int64_t last_token = least((pair.row + 1) * plan.tile, s.left.samples * s.left.tokens) - 1;
    return pair.col < plan.col_tiles && pair.col * plan.tile / s.left.tokens <= last_token / s.left.tokens;
  }
  // A long row of the triangle and the short one that has what it lacks make one of n + 1 tiles.
  const int64_t n = plan.row_tiles, long_row = b / (n + 1), at = b % (n + 1);
  if (at < n - long_row) {
    pair = {long_row, long_row + at};
    return true;
  }
  pair = {n - 1 - long_row, at - 1};
  return pair.row > long_row; // the middle row has no partner
}

__device__ __forceinline__ void write(const GradGram &s, int64_t i, int64_t j, double sum) {
  float *out = static_cast<float *>(s.out);
  out[s.diagonal ? i : i * s.out_row + j] = float(sum);
  if (s.symmetric && !s.diagonal)
    out[j * s.out_row + i] = float(sum);
}

// The tile's sum for one pair of samples: to where the other tiles' sums for it are, or out.
__device__ __forceinline__ void put(const GradGram &s, const Launch &at, const TilePair &pair, int64_t i, int64_t j,
                                    double sum) {
  if (s.symmetric && i == j && pair.row < pair.col)
    sum *= 2; // the tile below the diagonal, which no block takes
  const Plan &plan = at.plan;
  if (at.partials) {
    const int64_t row_piece = pair.row - i * s.left.tokens / plan.tile;
    const int64_t col_piece = pair.col - j * s.right.tokens / plan.tile;
    const int64_t number = s.diagonal ? i : i * s.right.samples + j;
    at.partials[(number * plan.row_pieces + row_piece) * plan.col_pieces + col_piece] = sum;
    return;
  }
  write(s, i, j, sum);
}

// By halving: as many roundings as the logarithm of the number of elements.
template <class Tile, int first = 0, int count = Tile::row_fragments * Tile::col_fragments * 4>
__device__ __forceinline__ float sum_of_elements(const WarpTile<Tile> &tile) {
  if constexpr (count == 1)
    return tile.value[first / 4 / Tile::col_fragments][first / 4 % Tile::col_fragments][first % 4];
  else
    return sum_of_elements<Tile, first, count / 2>(tile) + sum_of_elements<Tile, first + count / 2, count / 2>(tile);
}

// Samples whose tokens a window of a side has: those numbered [first, last].
struct Window {
  int64_t start; // the window's first token
  int tokens, left;
  int64_t first, last;

  __device__ Window(const GradGram::Side &side, int64_t start, int64_t size)
      : start(start), tokens(int(side.tokens)), left(int(least(size, side.samples * side.tokens - start))),
        first(start / side.tokens), last((start + left - 1) / side.tokens) {}

  // Where a sample begins and ends in the window.
  __device__ int begin(int64_t sample) const { return int(most(0, sample * tokens - start)); }
  __device__ int end(int64_t sample) const { return int(least(left, (sample + 1) * tokens - start)); }

  __device__ void find_rows(const GradGram::Side &side, int size, int threads, int64_t *a, int64_t *b) const {
    for (int r = int(threadIdx.x); r < size; r += threads) {
      const int64_t token = start + least(r, left - 1), sample = token / tokens, t = token % tokens;
      a[r] = sample * side.a_sample + t * side.a_token;
      b[r] = sample * side.b_sample + t * side.b_token;
    }
  }
};

template <class In, class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::resident) grad_gram_tile(GradGram s, Launch at) {
  using S = InnerStage<In, In, Tile>;
  constexpr int size = Tile::rows;
  TilePair pair;
  if (!find_pair(s, at.plan, blockIdx.x, pair))
    return;
  const Window rows(s.left, pair.row * size, size), cols(s.right, pair.col * size, size);
  const bool same = s.symmetric && pair.row == pair.col; // one window serves as both
  const int a_steps = int(ceil_div(s.d, S::features)), steps = a_steps + int(ceil_div(s.p, S::features));

  char *pipeline = dynamic_shared();
  int64_t *row_offsets = reinterpret_cast<int64_t *>(pipeline + stages * S::bytes),
          *col_offsets = row_offsets + 2 * size;
  rows.find_rows(s.left, size, Tile::threads, row_offsets, row_offsets + size);
  if (!same)
    cols.find_rows(s.right, size, Tile::threads, col_offsets, col_offsets + size);
  __syncthreads();

  int ahead = 0;
  const auto fetch = [&](int slot) {
    if (ahead < steps) {
      In *to = reinterpret_cast<In *>(pipeline + slot * S::bytes);
      const bool of_b = ahead >= a_steps;
      const int feature = (of_b ? ahead - a_steps : ahead) * S::features, left = int(of_b ? s.p : s.d) - feature;
      const void *x = of_b ? s.left.b : s.left.a, *y = of_b ? s.right.b : s.right.a;
      copy_rows<size, S::features, S::x_stride, Tile::threads>(of_b ? at.left.b : at.left.a, to,
                                                               static_cast<const In *>(x) + feature,
                                                               row_offsets + (of_b ? size : 0), rows.left, left);
      if (!same)
        copy_rows<size, S::features, S::y_stride, Tile::threads>(
            of_b ? at.right.b : at.right.a, to + size * S::x_stride, static_cast<const In *>(y) + feature,
            col_offsets + (of_b ? size : 0), cols.left, left);
      ++ahead;
    }
    copy_async_commit(); // an empty group too: the waits below count groups
  };
#pragma unroll 1
  for (int slot = 0; slot < stages - 1; ++slot)
    fetch(slot);

  int slot = 0;
  const auto add_scores = [&](WarpTile<Tile> &scores, int count) {
    for (int step = 0; step < count; ++step) {
      copy_async_wait<stages - 2>();
      __syncthreads(); // everyone's copies of this slot have landed, and everyone is done with the slot before it
      fetch((slot + stages - 1) % stages);
      const In *x = reinterpret_cast<const In *>(pipeline + slot * S::bytes);
      add_inner_product<In, In>(scores, x, same ? x : x + size * S::x_stride);
      slot = (slot + 1) % stages;
    }
  };
  WarpTile<Tile> products, b_scores;
  add_scores(products, a_steps);
  add_scores(b_scores, steps - a_steps);
#pragma unroll
  for (int i = 0; i < Tile::row_fragments; ++i)
#pragma unroll
    for (int j = 0; j < Tile::col_fragments; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        products.value[i][j][e] *= b_scores.value[i][j][e];

  __syncthreads(); // the pipeline is empty, and its memory free
  if (rows.first == rows.last && cols.first == cols.last) {
    float *warp_sums = reinterpret_cast<float *>(pipeline);
    const float warp_sum = sum_over_warp(sum_of_elements(products));
    if (products.lane == 0)
      warp_sums[threadIdx.x / 32] = warp_sum;
    __syncthreads(); // everyone's sums are there
    if (threadIdx.x == 0) {
      double sum = 0;
      for (int warp = 0; warp < Tile::warps; ++warp)
        sum += warp_sums[warp];
      put(s, at, pair, rows.first, cols.first, sum);
    }
    return;
  }

  // Several samples: sums along each row, sample by sample, then down the rows.
  constexpr int stride = size + 1;
  float *tile = reinterpret_cast<float *>(pipeline);
  products.for_each_pair([&](float x, float y, int r, int c) {
    tile[r * stride + c] = x;
    tile[r * stride + c + 1] = y;
  });
  __syncthreads(); // the whole tile is there
  const int col_samples = int(cols.last - cols.first + 1), row_samples = int(rows.last - rows.first + 1);
  for (int item = int(threadIdx.x); item < size * col_samples; item += Tile::threads) {
    const int r = item % size, begin = cols.begin(cols.first + item / size), end = cols.end(cols.first + item / size);
    double sum = 0;
    for (int c = begin; c < end; ++c)
      sum += tile[r * stride + c];
    tile[r * stride + begin] = float(sum);
  }
  __syncthreads(); // all rows are summed
  for (int item = int(threadIdx.x); item < row_samples * col_samples; item += Tile::threads) {
    const int64_t i = rows.first + item / col_samples, j = cols.first + item % col_samples;
    if (s.diagonal ? i != j : s.symmetric && i > j)
      continue;
    const int begin = rows.begin(i), end = rows.end(i), c = cols.begin(j);
    double sum = 0;
    for (int r = begin; r < end; ++r)
      sum += tile[r * stride + c];
    put(s, at, pair, i, j, sum);
  }
}

constexpr int sum_threads = 256;

// A warp per pair of samples: the sums of its tiles.
__global__ void __launch_bounds__(sum_threads) grad_gram_sum_pieces(GradGram s, Launch at) {
  const Plan &plan = at.plan;
  const int lane = int(threadIdx.x) % 32;
  const int64_t number = (int64_t(blockIdx.x) * sum_threads + threadIdx.x) / 32;
  const int64_t i = s.diagonal ? number : number / s.right.samples, j = s.diagonal ? number : number % s.right.samples;
  if (i >= s.left.samples || (s.symmetric && i > j))
    return;
  const int64_t T = s.left.tokens, T2 = s.right.tokens;
  const int row = int(i * T / plan.tile), rows = int(((i + 1) * T - 1) / plan.tile) - row + 1;
  const int col = int(j * T2 / plan.tile), cols = int(((j + 1) * T2 - 1) / plan.tile) - col + 1;
  const double *partials = at.partials + number * plan.row_pieces * plan.col_pieces;
  double sum = 0;
  for (int k = 0; k < rows; ++k)
    for (int l = lane; l < cols; l += 32)
      if (!s.symmetric || row + k <= col + l)
        sum += partials[k * plan.col_pieces + l];
  sum = sum_over_warp(sum);
  if (lane != 0)
    return;
  write(s, i, j, sum);
}

// Norms of few tokens are bound by memory: a block per sample reads each token once and multiplies it with itself and
// the others on the way.
constexpr int few_tokens = 4, norm_threads = 128, norm_warps = norm_threads / 32;
template <int tokens> constexpr int pairs_of_tokens = tokens * (tokens + 1) / 2;

// One thread's part of the scores of all pairs of tokens; 16 bytes of each at a time where `wide`.
template <int most_tokens, class In>
__device__ __forceinline__ void add_short_scores(const In *x, int64_t token_stride, int tokens, int n, bool wide,
                                                 float (&scores)[pairs_of_tokens<most_tokens>]) {
  constexpr int size = Vector<In>::size;
  const auto multiply = [&](const float (&token)[most_tokens]) {
    int pair = 0;
#pragma unroll
    for (int t = 0; t < most_tokens; ++t)
#pragma unroll
      for (int u = t; u < most_tokens; ++u)
        scores[pair++] += token[t] * token[u];
  };
  const int whole = wide ? n / size * size : 0;
  for (int f = int(threadIdx.x) * size; f < whole; f += norm_threads * size) {
    Vector<In> vectors[most_tokens];
#pragma unroll
    for (int t = 0; t < most_tokens; ++t)
      if (t < tokens)
        vectors[t] = load_vector(x + t * token_stride + f);
#pragma unroll
    for (int e = 0; e < size; ++e) {
      float token[most_tokens];
#pragma unroll
      for (int t = 0; t < most_tokens; ++t)
        token[t] = t < tokens ? widen(vectors[t].at[e]) : 0;
      multiply(token);
    }
  }
  for (int f = whole + int(threadIdx.x); f < n; f += norm_threads) {
    float token[most_tokens];
#pragma unroll
    for (int t = 0; t < most_tokens; ++t)
      token[t] = t < tokens ? widen(x[t * token_stride + f]) : 0;
    multiply(token);
  }
}

template <class In, int most_tokens>
__global__ void __launch_bounds__(norm_threads) grad_gram_short_norms(GradGram s, SideCopy copy) {
  constexpr int pairs = pairs_of_tokens<most_tokens>;
  const GradGram::Side &side = s.left;
  const int64_t sample = blockIdx.x;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  float *warp_scores = reinterpret_cast<float *>(dynamic_shared()); // [a or b][pair][warp]
  float scores[2][pairs] = {};
  add_short_scores<most_tokens>(static_cast<const In *>(side.a) + sample * side.a_sample, side.a_token,
                                int(side.tokens), int(s.d), copy.a == 16, scores[0]);
  add_short_scores<most_tokens>(static_cast<const In *>(side.b) + sample * side.b_sample, side.b_token,
                                int(side.tokens), int(s.p), copy.b == 16, scores[1]);
#pragma unroll
  for (int q = 0; q < 2 * pairs; ++q) {
    const float sum = sum_over_warp(scores[q / pairs][q % pairs]);
    if (lane == 0)
      warp_scores[q * norm_warps + warp] = sum;
  }
  __syncthreads(); // everyone's scores are there
  if (warp > 0)
    return;
  double product = 0;
  if (lane < pairs) {
    double a = 0, b = 0;
    for (int w = 0; w < norm_warps; ++w) {
      a += warp_scores[lane * norm_warps + w];
      b += warp_scores[(pairs + lane) * norm_warps + w];
    }
    bool with_itself = false;
    for (int t = 0, pair = 0; t < most_tokens; pair += most_tokens - t++)
      with_itself = with_itself || lane == pair;
    product = a * b * (with_itself ? 1 : 2);
  }
  product = sum_over_warp(product);
  if (lane == 0)
    write(s, sample, sample, product);
}

// ---------------------------------------------------------------------------------------------------------------------

// Plans are compared on a card of 132 multiprocessors, in large tiles' times. A small tile takes half of one, being a
// quarter of the products on half a multiprocessor, and half as much again, as it reads twice as much per product.
constexpr int64_t multiprocessors = 132;
constexpr double small_tile = 0.5 * 1.5;

// Tiles that `tokens` neighbours may lie in.
int64_t pieces(int64_t tokens, int64_t tile) {
  if (tile % tokens == 0)
    return 1;
  return tokens % tile == 0 ? tokens / tile : ceil_div(tokens - 1, tile) + 1;
}

template <class Tile> Plan plan_with(const GradGram &s) {
  const int64_t tile = Tile::rows;
  Plan plan{tile,
            ceil_div(s.left.samples * s.left.tokens, tile),
            ceil_div(s.right.samples * s.right.tokens, tile),
            pieces(s.left.tokens, tile),
            pieces(s.right.tokens, tile),
            0};
  plan.blocks = s.diagonal    ? plan.row_tiles * plan.row_pieces
                : s.symmetric ? ceil_div(plan.row_tiles, 2) * (plan.row_tiles + 1)
                              : plan.row_tiles * plan.col_tiles;
  return plan;
}

// float32 keeps to the small tile: split fragments beside the large one would spill.
Plan plan_of(const GradGram &s) {
  const Plan large = plan_with<LargeTile>(s), small = plan_with<SmallTile>(s);
  const double large_time = double(ceil_div(large.blocks, multiprocessors * LargeTile::resident));
  const double small_time = double(ceil_div(small.blocks, multiprocessors * SmallTile::resident)) * small_tile;
  return s.dtype != DType::f32 && large_time <= small_time ? large : small;
}

int64_t pairs_of(const GradGram &s) { return s.left.samples * (s.diagonal ? 1 : s.right.samples); }

bool is_empty(const GradGram &s) { return !s.left.tokens || !s.right.tokens || !s.d || !s.p; }

SideCopy copy_of(const GradGram::Side &side, int64_t element) {
  return {copy_bytes(side.a, side.a_sample, side.a_token, element),
          copy_bytes(side.b, side.b_sample, side.b_token, element)};
}

bool are_short_norms(const GradGram &s) { return s.diagonal && s.left.tokens <= few_tokens; }

template <class In> cudaError_t run_short_norms(const GradGram &s, const SideCopy &copy, void *stream) {
  constexpr int64_t pair = 2 * norm_warps * int64_t(sizeof(float));
  if (s.left.tokens == 1)
    return launch(grad_gram_short_norms<In, 1>, s.left.samples, norm_threads, pair, stream, s, copy);
  return launch(grad_gram_short_norms<In, few_tokens>, s.left.samples, norm_threads, pairs_of_tokens<few_tokens> * pair,
                stream, s, copy);
}

template <class In, class Tile> cudaError_t run(const GradGram &s, const Launch &at, void *stream) {
  using S = InnerStage<In, In, Tile>;
  constexpr int64_t offsets = 4 * Tile::rows * int64_t(sizeof(int64_t));
  static_assert(Tile::rows * (Tile::cols + 1) * 4 <= stages * S::bytes, "the tile lies where the pipeline was");
  cudaError_t error =
      launch(grad_gram_tile<In, Tile>, at.plan.blocks, Tile::threads, stages * S::bytes + offsets, stream, s, at);
  if (error == cudaSuccess && at.partials)
    error = launch(grad_gram_sum_pieces, ceil_div(pairs_of(s) * 32, sum_threads), sum_threads, 0, stream, s, at);
  return error;
}

template <class Half> cudaError_t run_half(const GradGram &s, const Launch &at, void *stream) {
  return at.plan.tile == LargeTile::rows ? run<Half, LargeTile>(s, at, stream) : run<Half, SmallTile>(s, at, stream);
}

} // namespace

int64_t grad_gram_cuda_workspace(const GradGram &s) {
  if (!pairs_of(s) || is_empty(s) || are_short_norms(s))
    return 0;
  const Plan plan = plan_of(s);
  const int64_t each = plan.row_pieces * plan.col_pieces;
  return each > 1 ? pairs_of(s) * each * int64_t(sizeof(double)) : 0;
}

int grad_gram_cuda(const GradGram &s, void *workspace, void *stream) {
  if (s.dtype == DType::f64)
    return cudaErrorNotSupported;
  if (!pairs_of(s))
    return cudaSuccess;
  if (is_empty(s)) {
    const int64_t cols = s.diagonal ? s.left.samples : s.right.samples, rows = s.diagonal ? 1 : s.left.samples;
    return cudaMemset2DAsync(s.out, size_t(s.diagonal ? cols : most(s.out_row, cols)) * 4, 0, size_t(cols) * 4,
                             size_t(rows), static_cast<cudaStream_t>(stream));
  }
  Launch at{};
  at.plan = plan_of(s);
  const int64_t longest = most(s.left.samples * s.left.tokens, s.right.samples * s.right.tokens);
  if (most(most(longest, at.plan.blocks), most(s.d, s.p)) + LargeTile::rows > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  at.left = copy_of(s.left, size_of(s.dtype)), at.right = copy_of(s.right, size_of(s.dtype));
  if (are_short_norms(s))
    return s.dtype == DType::f32    ? run_short_norms<float>(s, at.left, stream)
           : s.dtype == DType::bf16 ? run_short_norms<bf16>(s, at.left, stream)
                                    : run_short_norms<f16>(s, at.left, stream);
  at.partials = grad_gram_cuda_workspace(s) ? static_cast<double *>(workspace) : nullptr;
  if (s.dtype == DType::f32)
    return run<float, SmallTile>(s, at, stream);
  return s.dtype == DType::bf16 ? run_half<bf16>(s, at, stream) : run_half<f16>(s, at, stream);
}

} // namespace gg
