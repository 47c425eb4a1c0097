// grad_stats on tensor cores: the weight-gradient GEMM, one output tile per block, sample by sample. The sample's tile
// of G and the running tile of dW both stay in registers; norms and dots are taken from the first before it is added to
// the second. Loads run ahead across samples, so the statistics of one hide the loads of the next. See
// docs/gpu/grad_stats.md.
#include "core/launch.cuh"
#include "core/tile.cuh"
#include "grad_stats/grad_stats.h"
#include <type_traits>

namespace gg {
namespace {

using LargeTile = TileShape<128, 128, 64, 32, 1>; // 128 of its 255 registers per thread are the two tiles
using SmallTile = TileShape<64, 64, 32, 32, 2>;

constexpr int stages = 4;

// How the work is cut; a function of the shapes alone, and so are the bits of the results.
struct Plan {
  bool large;
  int64_t col_tiles, tiles;
  int64_t splits; // blocks that share a tile, each with its own samples
};

// Where a block finds things and what it may touch.
struct Launch {
  Plan plan;
  int a_copy, b_copy;       // bytes per copy that the operand's alignment allows: 16, 4 or one element
  int staged_directions;    // how many directions' tiles fit into shared memory; others are read through L2
  float *partials;          // [samples][1 + directions][tiles]
  float *split_weight_grad; // [splits][p][d], or null when each tile has one block
};

// The block's tile of every direction: the first few staged in shared memory, zero past the edges, the others where
// they are. `Dir` is D's element type.
template <class Dir, class Tile> struct Directions {
  static constexpr int stride = Tile::cols + bank_skew, elements = Tile::rows * stride;
  const GradStats &s;
  Dir *staged;
  const Dir *tile; // the first direction's
  int rows_left, cols_left;

  __device__ __forceinline__ void stage(int count) const {
    for (int i = int(threadIdx.x); i < count * Tile::rows * Tile::cols; i += Tile::threads) {
      const int c = i % Tile::cols, r = i / Tile::cols % Tile::rows, k = i / (Tile::rows * Tile::cols);
      const bool inside = r < rows_left && c < cols_left;
      staged[k * elements + r * stride + c] = inside ? tile[k * s.D_direction + r * s.D_row + c] : Dir{};
    }
  }

  __device__ __forceinline__ float dot_staged(const WarpTile<Tile> &grad, int k) const {
    float sum = 0;
    grad.for_each_pair([&](float x, float y, int r, int c) {
      const float2 D = load_pair(staged + k * elements + r * stride + c);
      sum += x * D.x;
      sum += y * D.y;
    });
    return sum;
  }

  __device__ __forceinline__ float dot(const WarpTile<Tile> &grad, int k) const {
    const Dir *direction = tile + k * s.D_direction;
    const int64_t row_stride = opaque(s.D_row); // or its multiples would live in registers through the product's loop
    float sum = 0;
    grad.for_each_pair([&](float x, float y, int r, int c) {
      const Dir *D = direction + r * row_stride + c;
      if (r < rows_left && c < cols_left)
        sum += x * widen(D[0]);
      if (r < rows_left && c + 1 < cols_left)
        sum += y * widen(D[1]);
    });
    return sum;
  }
};

template <class In, class Dir, class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::resident) grad_stats_tile(GradStats s, Launch at) {
  using S = Stage<In, Tile>;
  const Plan &plan = at.plan;
  const int tile = int(blockIdx.x % plan.tiles), split = int(blockIdx.x / plan.tiles);
  const int64_t row = tile / plan.col_tiles * Tile::rows, col = tile % plan.col_tiles * Tile::cols;
  const int first = int(s.samples * split / plan.splits), last = int(s.samples * (split + 1) / plan.splits);
  const int tokens = int(s.tokens);
  const int rows_left = int(least(Tile::rows, s.p - row)), cols_left = int(least(Tile::cols, s.d - col));

  In *pipeline = reinterpret_cast<In *>(dynamic_shared());
  const Directions<Dir, Tile> directions{s, reinterpret_cast<Dir *>(pipeline + stages * S::elements),
                                         static_cast<const Dir *>(s.D) + row * s.D_row + col, rows_left, cols_left};
  float *warp_sums = reinterpret_cast<float *>(directions.staged + at.staged_directions * directions.elements);
  directions.stage(at.staged_directions);

  int ahead_sample = first, ahead_token = 0;
  const auto fetch = [&](int slot) {
    if (ahead_sample < last) {
      In *to = pipeline + slot * S::elements;
      const In *a = static_cast<const In *>(s.a) + int64_t(ahead_sample) * s.a_sample + ahead_token * s.a_token + col;
      const In *b = static_cast<const In *>(s.b) + ahead_sample * s.b_sample + ahead_token * s.b_token + row;
      copy_stage<Tile>(to, at.a_copy, a, s.a_token, at.b_copy, b, s.b_token, tokens - ahead_token, cols_left,
                       rows_left);
      ahead_token += S::tokens;
      if (ahead_token >= tokens) {
        ahead_token = 0;
        ++ahead_sample;
      }
    }
    copy_async_commit(); // an empty group too: the waits below count groups
  };
#pragma unroll 1
  for (int slot = 0; slot < stages - 1; ++slot)
    fetch(slot);

  WarpTile<Tile> weight_grad;
  int slot = 0;
  for (int sample = first; sample < last; ++sample) {
    WarpTile<Tile> grad;
    for (int token = 0; token < tokens; token += S::tokens) {
      copy_async_wait<stages - 2>();
      __syncthreads(); // everyone's copies of this slot have landed, and everyone is done with the slot before it
      fetch((slot + stages - 1) % stages);
      grad.add_product(pipeline + slot * S::elements);
      slot = (slot + 1) % stages;
    }

    const auto put = [&](int q, float sum) {
      sum = sum_over_warp(sum);
      if (grad.lane == 0)
        warp_sums[q * Tile::warps + threadIdx.x / 32] = sum;
    };
    float squares = 0;
    grad.for_each_pair([&](float x, float y, int, int) { squares += x * x + y * y; });
    put(0, squares);
    for (int k = 0; k < at.staged_directions; ++k)
      put(1 + k, directions.dot_staged(grad, k));
    for (int k = at.staged_directions; k < int(s.directions); ++k)
      put(1 + k, directions.dot(grad, k));
#pragma unroll
    for (int i = 0; i < Tile::row_fragments; ++i)
#pragma unroll
      for (int j = 0; j < Tile::col_fragments; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          weight_grad.value[i][j][e] += grad.value[i][j][e];

    __syncthreads(); // the next write of warp_sums lies behind the next sample's first barrier
    for (int q = int(threadIdx.x); q <= int(s.directions); q += Tile::threads) {
      float sum = 0;
      for (int warp = 0; warp < Tile::warps; ++warp)
        sum += warp_sums[q * Tile::warps + warp];
      at.partials[(int64_t(sample) * (1 + s.directions) + q) * plan.tiles + tile] = sum;
    }
  }

  if (!s.weight_grad)
    return;
  float *out = static_cast<float *>(s.weight_grad);
  int64_t out_row = s.weight_grad_row;
  if (at.split_weight_grad) {
    out = at.split_weight_grad + split * s.p * s.d;
    out_row = s.d;
  }
  const bool add = s.accumulate && !at.split_weight_grad;
  weight_grad.for_each_pair([&](float x, float y, int r, int c) {
    float *to = out + (row + r) * out_row + col + c;
    if (r < rows_left && c < cols_left)
      to[0] = add ? to[0] + x : x;
    if (r < rows_left && c + 1 < cols_left)
      to[1] = add ? to[1] + y : y;
  });
}

constexpr int sum_threads = 256;

// A warp per number: norms and dots from the partial sums of all tiles, in float64.
__global__ void __launch_bounds__(sum_threads) grad_stats_sum_tiles(GradStats s, Launch at) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t number = (int64_t(blockIdx.x) * sum_threads + threadIdx.x) / 32;
  const int64_t sample = number / (1 + s.directions), q = number % (1 + s.directions);
  if (sample >= s.samples)
    return;
  double sum = 0;
  for (int64_t tile = lane; tile < at.plan.tiles; tile += 32)
    sum += at.partials[number * at.plan.tiles + tile];
  sum = sum_over_warp(sum);
  if (lane != 0)
    return;
  if (q > 0)
    static_cast<float *>(s.dots)[sample * s.directions + q - 1] = float(sum);
  else if (s.norms2)
    static_cast<float *>(s.norms2)[sample] = float(sum);
}

__global__ void __launch_bounds__(sum_threads) grad_stats_sum_splits(GradStats s, Launch at) {
  const int64_t i = int64_t(blockIdx.x) * sum_threads + threadIdx.x;
  if (i >= s.p * s.d)
    return;
  float *to = static_cast<float *>(s.weight_grad) + i / s.d * s.weight_grad_row + i % s.d;
  float sum = s.accumulate ? *to : 0;
  for (int64_t split = 0; split < at.plan.splits; ++split)
    sum += at.split_weight_grad[split * s.p * s.d + i];
  *to = sum;
}

// ---------------------------------------------------------------------------------------------------------------------

// Plans are compared on a card of 132 multiprocessors. Time is counted in tokens of one tile; writing a tile of dW and
// reading it back takes as long as about 500 of them. A small tile's token takes half of a large one's, being a quarter
// of the products on half a multiprocessor, and half as much again, as it reads twice as much per product.
constexpr int64_t multiprocessors = 132, most_splits = 16, merge_tokens = 500;
constexpr double small_token = 0.5 * 1.5;

template <class Tile> int64_t time_of(const GradStats &s, const Plan &plan) {
  const int64_t slots = multiprocessors * Tile::resident, blocks = plan.tiles * plan.splits;
  const int64_t merge = s.weight_grad && plan.splits > 1 ? blocks * merge_tokens / slots : 0;
  return ceil_div(blocks, slots) * ceil_div(s.samples, plan.splits) * s.tokens + merge;
}

template <class Tile> Plan plan_with(const GradStats &s) {
  Plan best{std::is_same_v<Tile, LargeTile>, ceil_div(s.d, Tile::cols), ceil_div(s.p, Tile::rows), 1};
  best.tiles *= best.col_tiles;
  for (Plan plan = best; plan.splits <= least(s.samples, most_splits); ++plan.splits)
    if (time_of<Tile>(s, plan) < time_of<Tile>(s, best))
      best = plan;
  return best;
}

// float32 keeps to the small tile: split fragments beside the large one would spill, and with three products per load
// there is no bandwidth to save.
Plan plan_of(const GradStats &s) {
  const Plan large = plan_with<LargeTile>(s), small = plan_with<SmallTile>(s);
  const bool large_is_faster =
      double(time_of<LargeTile>(s, large)) <= small_token * double(time_of<SmallTile>(s, small));
  return s.dtype != DType::f32 && large_is_faster ? large : small;
}

int64_t partials_of(const GradStats &s, const Plan &plan) { return s.samples * (1 + s.directions) * plan.tiles; }

bool is_empty(const GradStats &s) { return !s.samples || !s.tokens || !s.d || !s.p; }

cudaError_t zero_outputs(const GradStats &s, void *stream) {
  cudaError_t error = zero(s.norms2, s.samples * 4, stream);
  if (error == cudaSuccess)
    error = zero(s.dots, s.samples * s.directions * 4, stream);
  if (error == cudaSuccess && s.weight_grad && !s.accumulate && s.p && s.d)
    error = cudaMemset2DAsync(s.weight_grad, size_t(most(s.weight_grad_row, s.d)) * 4, 0, size_t(s.d) * 4, size_t(s.p),
                              static_cast<cudaStream_t>(stream));
  return error;
}

template <class In, class Dir, class Tile> cudaError_t run(const GradStats &s, Launch at, void *stream) {
  int device = 0, multiprocessor_shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessor_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess)
    return error;
  constexpr int64_t reserved = 1024, pipeline = stages * Stage<In, Tile>::elements * int64_t(sizeof(In));
  constexpr int64_t direction = Directions<Dir, Tile>::elements * int64_t(sizeof(Dir));
  const int64_t fixed = pipeline + (1 + s.directions) * Tile::warps * int64_t(sizeof(float));
  const int64_t room = multiprocessor_shared / Tile::resident - reserved - fixed;
  at.staged_directions = int(least(s.directions, most(0, room / direction)));

  error = launch(grad_stats_tile<In, Dir, Tile>, at.plan.tiles * at.plan.splits, Tile::threads,
                 fixed + at.staged_directions * direction, stream, s, at);
  const int64_t numbers = s.samples * (1 + s.directions);
  if (error == cudaSuccess)
    error = launch(grad_stats_sum_tiles, ceil_div(numbers * 32, sum_threads), sum_threads, 0, stream, s, at);
  if (error == cudaSuccess && at.split_weight_grad)
    error = launch(grad_stats_sum_splits, ceil_div(s.p * s.d, sum_threads), sum_threads, 0, stream, s, at);
  return error;
}

template <class In, class Tile> cudaError_t run(const GradStats &s, const Launch &at, void *stream) {
  const bool wide = s.directions == 0 || s.direction_dtype == DType::f32;
  return wide ? run<In, float, Tile>(s, at, stream) : run<In, In, Tile>(s, at, stream);
}

template <class Half> cudaError_t run_half(const GradStats &s, const Launch &at, void *stream) {
  return at.plan.large ? run<Half, LargeTile>(s, at, stream) : run<Half, SmallTile>(s, at, stream);
}

} // namespace

int64_t grad_stats_cuda_workspace(const GradStats &s) {
  if (is_empty(s))
    return 0;
  const Plan plan = plan_of(s);
  const int64_t merged = s.weight_grad && plan.splits > 1 ? plan.splits * s.p * s.d : 0;
  return (partials_of(s, plan) + merged) * int64_t(sizeof(float));
}

int grad_stats_cuda(const GradStats &s, void *workspace, void *stream) {
  if (s.dtype == DType::f64)
    return cudaErrorNotSupported;
  if (is_empty(s))
    return zero_outputs(s, stream);
  Launch at{};
  at.plan = plan_of(s);
  if (most(most(s.samples, s.tokens), most(s.directions, at.plan.tiles * at.plan.splits)) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  at.a_copy = copy_bytes(s.a, s.a_sample, s.a_token, size_of(s.dtype));
  at.b_copy = copy_bytes(s.b, s.b_sample, s.b_token, size_of(s.dtype));
  at.partials = static_cast<float *>(workspace);
  at.split_weight_grad = s.weight_grad && at.plan.splits > 1 ? at.partials + partials_of(s, at.plan) : nullptr;
  if (s.dtype == DType::f32)
    return run<float, SmallTile>(s, at, stream);
  return s.dtype == DType::bf16 ? run_half<bf16>(s, at, stream) : run_half<f16>(s, at, stream);
}

} // namespace gg
