// adam_dots on tensor cores: the weight-gradient GEMM, one output tile per block, sample by sample, as grad_stats has
// it. What AdamW's state makes of the tile, and as many directions as fit, are staged in shared memory once; a sample's
// finished tile becomes its change of step in registers. Loads run ahead across samples, so the steps of one hide the
// loads of the next. See docs/gpu/adam_dots.md.
#include "adam_dots/adam_dots.h"
#include "core/adam_step.h"
#include "core/launch.cuh"
#include "core/tile.cuh"

namespace gg {
namespace {

using Tile = TileShape<64, 64, 32, 32, 2>;

constexpr int stages = 4;

// How the work is cut; a function of the shapes alone, and so are the bits of the results.
struct Plan {
  int64_t col_tiles, tiles;
  int64_t splits; // blocks that share a tile, each with its own samples
};

// Where a block finds things and what it may touch.
struct Launch {
  Plan plan;
  StepConstants<float> constants;
  int a_copy, b_copy;    // bytes per copy that the operand's alignment allows: 16, 4 or one element
  int staged_directions; // how many directions' tiles fit into shared memory; others are read through L2
  float *partials;       // [samples][directions][tiles]
};

// An element of a matrix of the dtype of a and b or of float32.
template <class In> __device__ __forceinline__ float element(const void *matrix, bool wide, int64_t at) {
  return wide ? static_cast<const float *>(matrix)[at] : widen(static_cast<const In *>(matrix)[at]);
}

// The block's tile of r0, of pull and of the first directions, staged in shared memory; past the edges everything is 0
// but r0. Directions that have no room are read where they are.
template <class In> struct Staged {
  static constexpr int stride = Tile::cols + bank_skew, elements = Tile::rows * stride;
  const AdamDots &s;
  float *root, *pull, *directions;
  int64_t row, col;
  int rows_left, cols_left;

  __device__ __forceinline__ void stage(const StepConstants<float> &constants, int count) const {
    const bool wide_moments = s.moment_dtype == DType::f32, wide_directions = s.direction_dtype == DType::f32;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < Tile::rows * Tile::cols; i += Tile::threads) {
      const int c = i % Tile::cols, r = i / Tile::cols, to = r * stride + c;
      const bool inside = r < rows_left && c < cols_left;
      const int64_t m_at = (row + r) * s.m_row + col + c, v_at = (row + r) * s.v_row + col + c;
      const float m = inside ? element<In>(s.m, wide_moments, m_at) : 0;
      const float v = inside ? element<In>(s.v, wide_moments, v_at) : 0;
      const StepState<float> state = step_state<float>(constants, m, v);
      root[to] = state.root;
      pull[to] = state.pull;
      for (int k = 0; k < count; ++k)
        directions[k * elements + to] = inside ? element<In>(s.D, wide_directions, direction_at(k, r, c)) : 0;
    }
  }

  __device__ __forceinline__ int64_t direction_at(int k, int r, int c) const {
    return k * s.D_direction + (row + r) * s.D_row + col + c;
  }

  // Writes the change of step over the gradient.
  __device__ __forceinline__ void take_step(WarpTile<Tile> &grad, float eps, float scale) const {
    grad.for_each_pair([&](float &x, float &y, int r, int c) {
      const float2 roots = load_pair(root + r * stride + c), pulls = load_pair(pull + r * stride + c);
      x = step_change<float>(eps, {roots.x, pulls.x}, scale * x);
      y = step_change<float>(eps, {roots.y, pulls.y}, scale * y);
    });
  }

  __device__ __forceinline__ float dot_staged(const WarpTile<Tile> &change, int k) const {
    float sum = 0;
    change.for_each_pair([&](float x, float y, int r, int c) {
      const float2 D = load_pair(directions + k * elements + r * stride + c);
      sum += x * D.x;
      sum += y * D.y;
    });
    return sum;
  }

  __device__ __forceinline__ float dot(const WarpTile<Tile> &change, int k) const {
    const bool wide = s.direction_dtype == DType::f32;
    const int64_t first = opaque(direction_at(k, 0, 0)), D_row = opaque(s.D_row); // kept out of the product's loop
    float sum = 0;
    change.for_each_pair([&](float x, float y, int r, int c) {
      if (r < rows_left && c < cols_left)
        sum += x * element<In>(s.D, wide, first + r * D_row + c);
      if (r < rows_left && c + 1 < cols_left)
        sum += y * element<In>(s.D, wide, first + r * D_row + c + 1);
    });
    return sum;
  }
};

template <class In>
__global__ void __launch_bounds__(Tile::threads, Tile::resident) adam_dots_tile(AdamDots s, Launch at) {
  using S = Stage<In, Tile>;
  const Plan &plan = at.plan;
  const int tile = int(blockIdx.x % plan.tiles), split = int(blockIdx.x / plan.tiles);
  const int64_t row = tile / plan.col_tiles * Tile::rows, col = tile % plan.col_tiles * Tile::cols;
  const int first = int(s.samples * split / plan.splits), last = int(s.samples * (split + 1) / plan.splits);
  const int tokens = int(s.tokens);
  const int rows_left = int(least(Tile::rows, s.p - row)), cols_left = int(least(Tile::cols, s.d - col));

  In *pipeline = reinterpret_cast<In *>(dynamic_shared());
  float *root = reinterpret_cast<float *>(pipeline + stages * S::elements);
  float *pull = root + Staged<In>::elements, *directions = pull + Staged<In>::elements;
  float *warp_sums = directions + at.staged_directions * Staged<In>::elements;
  const Staged<In> staged{s, root, pull, directions, row, col, rows_left, cols_left};
  staged.stage(at.constants, at.staged_directions); // read behind the first sample's barriers

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

    staged.take_step(grad, at.constants.eps, at.constants.scale * static_cast<const float *>(s.clip)[sample]);
    for (int k = 0; k < int(s.directions); ++k) {
      const float sum = sum_over_warp(k < at.staged_directions ? staged.dot_staged(grad, k) : staged.dot(grad, k));
      if (grad.lane == 0)
        warp_sums[k * Tile::warps + threadIdx.x / 32] = sum;
    }
    __syncthreads(); // the next write of warp_sums lies behind the next sample's first barrier
    for (int k = int(threadIdx.x); k < int(s.directions); k += Tile::threads) {
      float sum = 0;
      for (int warp = 0; warp < Tile::warps; ++warp)
        sum += warp_sums[k * Tile::warps + warp];
      at.partials[(int64_t(sample) * s.directions + k) * plan.tiles + tile] = sum;
    }
  }
}

constexpr int sum_threads = 256;

// A warp per number: dots from the partial sums of all tiles, in float64.
__global__ void __launch_bounds__(sum_threads) adam_dots_sum_tiles(AdamDots s, Launch at) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t number = (int64_t(blockIdx.x) * sum_threads + threadIdx.x) / 32;
  if (number >= s.samples * s.directions)
    return;
  double sum = 0;
  for (int64_t tile = lane; tile < at.plan.tiles; tile += 32)
    sum += at.partials[number * at.plan.tiles + tile];
  sum = sum_over_warp(sum);
  if (lane == 0)
    static_cast<float *>(s.out)[number] = float(at.constants.unit * sum);
}

// ---------------------------------------------------------------------------------------------------------------------

// Samples are split where blocks of all tiles would leave multiprocessors of a nominal card idle; a block stages its
// state once, which takes as long as about 300 tokens of its tile.
constexpr int64_t multiprocessors = 132, most_splits = 64, staging_tokens = 300;

int64_t time_of(const AdamDots &s, const Plan &plan) {
  const int64_t waves = ceil_div(plan.tiles * plan.splits, multiprocessors * Tile::resident);
  return waves * (ceil_div(s.samples, plan.splits) * s.tokens + staging_tokens);
}

Plan plan_of(const AdamDots &s) {
  Plan best{ceil_div(s.d, Tile::cols), 0, 1};
  best.tiles = ceil_div(s.p, Tile::rows) * best.col_tiles;
  for (Plan plan = best; plan.splits <= least(s.samples, most_splits); ++plan.splits)
    if (time_of(s, plan) < time_of(s, best))
      best = plan;
  return best;
}

bool is_empty(const AdamDots &s) { return !s.samples || !s.tokens || !s.d || !s.p || !s.directions; }

template <class In> cudaError_t run(const AdamDots &s, Launch at, void *stream) {
  int device = 0, multiprocessor_shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessor_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess)
    return error;
  constexpr int64_t reserved = 1024, matrix = Staged<In>::elements * int64_t(sizeof(float));
  constexpr int64_t pipeline = stages * Stage<In, Tile>::elements * int64_t(sizeof(In));
  const int64_t fixed = pipeline + 2 * matrix + s.directions * Tile::warps * int64_t(sizeof(float));
  int64_t room = multiprocessor_shared / Tile::resident - reserved - fixed;
  if (room < 0) // on a card of 100 KiB a block is alone
    room = multiprocessor_shared - reserved - fixed;
  at.staged_directions = int(least(s.directions, most(0, room / matrix)));

  error = launch(adam_dots_tile<In>, at.plan.tiles * at.plan.splits, Tile::threads,
                 fixed + at.staged_directions * matrix, stream, s, at);
  if (error == cudaSuccess)
    error = launch(adam_dots_sum_tiles, ceil_div(s.samples * s.directions * 32, sum_threads), sum_threads, 0, stream, s,
                   at);
  return error;
}

} // namespace

int64_t adam_dots_cuda_workspace(const AdamDots &s) {
  return is_empty(s) ? 0 : s.samples * s.directions * plan_of(s).tiles * int64_t(sizeof(float));
}

int adam_dots_cuda(const AdamDots &s, void *workspace, void *stream) {
  if (s.dtype == DType::f64)
    return cudaErrorNotSupported;
  if (is_empty(s))
    return zero(s.out, s.samples * s.directions * 4, stream);
  Launch at{plan_of(s), {s.eta, s.beta1, s.beta2, s.eps, s.bc1, s.bc2}, 0, 0, 0, static_cast<float *>(workspace)};
  if (most(most(s.samples, s.tokens), most(s.directions, at.plan.tiles * at.plan.splits)) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  at.a_copy = copy_bytes(s.a, s.a_sample, s.a_token, size_of(s.dtype));
  at.b_copy = copy_bytes(s.b, s.b_sample, s.b_token, size_of(s.dtype));
  if (s.dtype == DType::f32)
    return run<float>(s, at, stream);
  return s.dtype == DType::bf16 ? run<bf16>(s, at, stream) : run<f16>(s, at, stream);
}

} // namespace gg
