// grad_project on tensor cores. Kronecker: tokens times P^T, features in spans over the blocks, then one small product
// per sample. Sparse: a block forms a sample's tiles of G one after the other and adds each to a table of buckets, by a
// list of the tile's elements that is sorted by bucket once and serves all samples. See docs/gpu/grad_project.md.
#include "core/inner.cuh"
#include "core/launch.cuh"
#include "core/log.h"
#include "core/philox.h"
#include "grad_project/grad_project.h"
#include <cmath>

namespace gg {
namespace {

constexpr int stages = 4, threads = 256;

// Launches are planned for a card of 132 multiprocessors with two blocks each.
constexpr int64_t wanted_blocks = 264;

struct Words {
  uint64_t at[4];
  __device__ Words(const GradProject &s, int64_t col, int64_t row_word, int64_t purpose)
      : at{uint64_t(col), uint64_t(row_word), uint64_t(purpose), s.layer} {
    philox4x32_10(at, s.seed);
  }
};

// ---- Kronecker ------------------------------------------------------------------------------------------------------

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

// ---- Sparse ---------------------------------------------------------------------------------------------------------

using SketchTile = TileShape<64, 64, 32, 32, 2>;
constexpr int tile_elements = SketchTile::rows * SketchTile::cols, tile_stride = SketchTile::cols + 1;
constexpr int run_length = tile_elements / SketchTile::threads; // elements of a list that a thread adds up

constexpr int list_warps = threads / 32, list_rounds = tile_elements / threads, digits = 256;
constexpr uint32_t none = 0x7fffffff; // the bucket of elements beyond the edges of G; buckets are fewer

// Elements of a tile by bucket, for each of `nonzeros`: bucket below the sign in bit 31, and place in the tile. The
// i-th element of thread t's run is at [i][t], so that threads read neighbours.
struct Lists {
  uint32_t *buckets;
  uint16_t *places;
};

struct Sparse {
  int64_t col_tiles, tiles;
  int64_t first_tile, some_tiles; // those whose lists exist at this time
  int64_t slabs;                  // blocks that share a sample, each with its own tiles
  bool shared_table;
  int a_copy, b_copy;
  Lists lists;
  float *tables; // [samples][slabs][buckets]
};

// The list of one tile and one nonzero: hashes are drawn, and elements sorted by them, digit by digit, in stable order.
__global__ void __launch_bounds__(threads) grad_project_list(GradProject s, Sparse at) {
  const int64_t tile = at.first_tile + blockIdx.x / s.nonzeros, j = blockIdx.x % s.nonzeros;
  const int64_t row = tile / at.col_tiles * SketchTile::rows, col = tile % at.col_tiles * SketchTile::cols;
  const uint32_t first = uint32_t(j * s.buckets / s.nonzeros);
  const uint32_t width = uint32_t((j + 1) * s.buckets / s.nonzeros) - first;

  uint32_t *hashes = reinterpret_cast<uint32_t *>(dynamic_shared()); // by element
  uint32_t *counts = hashes + tile_elements;                         // [digit][warp]
  uint32_t *sums = counts + digits * list_warps;                     // by digit, two of them
  uint16_t *order = reinterpret_cast<uint16_t *>(sums + 2 * digits), *next = order + tile_elements;
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;

  for (int i = thread; i < tile_elements / 4; i += threads) {
    const int c = i % SketchTile::cols, r = i / SketchTile::cols * 4;
    const Words words(s, col + c, (row + r) / 4, 2 + j);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int e = (r + q) * SketchTile::cols + c;
      const bool inside = row + r + q < s.p && col + c < s.d;
      const uint32_t hash = uint32_t(words.at[q] * width >> 32) + first | uint32_t(words.at[q]) << 31;
      hashes[e] = inside ? hash : none;
      order[e] = uint16_t(e);
    }
  }

  for (int shift = 0; shift < 32 && width >> shift; shift += 8) {
    for (int i = thread; i < digits * list_warps; i += threads)
      counts[i] = 0;
    __syncthreads(); // the order so far is there, and counts are zero
    const auto digit_of = [&](int e) { return (uint32_t(least((hashes[e] & none) - first, width)) >> shift) % digits; };
    // A warp has its part of the order, of which 32 elements come at a time.
    const auto for_each_round = [&](auto use) {
      for (int round = 0; round < list_rounds; ++round) {
        const int e = order[(warp * list_rounds + round) * 32 + lane];
        const uint32_t digit = digit_of(e), alike = match_over_warp(digit);
        uint32_t &count = counts[digit * list_warps + warp];
        const int before = __popc(alike & ((1u << lane) - 1));
        use(e, count + uint32_t(before));
        __syncwarp(); // everyone has read the count
        if (before == 0)
          count += uint32_t(__popc(alike));
        __syncwarp(); // the count is there for the next round
      }
    };
    for_each_round([](int, uint32_t) {});
    __syncthreads(); // all elements are counted
    // Where each warp's elements of each digit begin.
    uint32_t own = 0;
    for (int w = 0; w < list_warps; ++w)
      own += counts[thread * list_warps + w];
    sums[thread] = own;
    uint32_t *from = sums, *to = sums + digits;
    for (int distance = 1; distance < digits; distance *= 2) {
      __syncthreads(); // the sums so far are there
      to[thread] = from[thread] + (thread >= distance ? from[thread - distance] : 0);
      uint32_t *const swap = from;
      from = to, to = swap;
    }
    uint32_t begin = from[thread] - own;
    for (int w = 0; w < list_warps; ++w) {
      const uint32_t count = counts[thread * list_warps + w];
      counts[thread * list_warps + w] = begin;
      begin += count;
    }
    __syncthreads(); // all beginnings are there
    for_each_round([&](int e, uint32_t place) { next[place] = uint16_t(e); });
    __syncthreads(); // the next order is there
    uint16_t *const swap = order;
    order = next, next = swap;
  }

  __syncthreads(); // where there was one bucket and no digit to sort by
  const int64_t list = int64_t(blockIdx.x) * tile_elements;
  for (int i = thread; i < tile_elements; i += threads) {
    const int e = order[i % SketchTile::threads * run_length + i / SketchTile::threads];
    at.lists.buckets[list + i] = hashes[e];
    at.lists.places[list + i] = uint16_t(e / SketchTile::cols * tile_stride + e % SketchTile::cols);
  }
}

// What a thread has of a list's first and last bucket, which others may have too; in between it is alone.
struct Ends {
  uint32_t first, last; // last is past all buckets where the thread has but one
  float first_sum, last_sum;
};
constexpr uint32_t only_one = 0xffffffff;

// Adds a tile's elements to the table, each under its sign. No two threads add to one bucket: one that several have
// elements of belongs to the thread where it begins.
__device__ __forceinline__ void add_to_table(const uint32_t *buckets, const uint16_t *places, const float *tile,
                                             Ends *ends, float *table) {
  const int thread = int(threadIdx.x);
  Ends own{0, only_one, 0, 0};
  uint32_t bucket = buckets[thread] & none;
  own.first = bucket;
  bool first = true;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < run_length; ++i) {
    const uint32_t hash = buckets[i * SketchTile::threads + thread];
    const float value = float_of_bits(bits_of_float(tile[places[i * SketchTile::threads + thread]]) ^ (hash & ~none));
    if ((hash & none) != bucket) {
      if (first)
        own.first_sum = sum;
      else
        table[bucket] += sum;
      first = false;
      bucket = hash & none;
      sum = 0;
    }
    sum += value;
  }
  if (first)
    own.first_sum = sum;
  else
    own.last = bucket, own.last_sum = sum;
  ends[thread] = own;
  __syncthreads(); // everyone's ends are there

  // A bucket's elements that other threads have lie at the beginnings of those behind.
  const auto finish = [&](uint32_t bucket, float sum, bool goes_on) {
    for (int t = thread + 1; goes_on && t < SketchTile::threads && ends[t].first == bucket; ++t) {
      sum += ends[t].first_sum;
      goes_on = ends[t].last == only_one;
    }
    if (bucket != none)
      table[bucket] += sum;
  };
  bool begins_here = true;
  if (thread > 0) {
    const Ends before = ends[thread - 1];
    begins_here = own.first != (before.last == only_one ? before.first : before.last);
  }
  if (begins_here)
    finish(own.first, own.first_sum, own.last == only_one);
  if (own.last != only_one)
    finish(own.last, own.last_sum, true);
  __syncthreads(); // everyone is done with the ends
}

// One sample's sums over a slab of tiles of G.
template <class In>
__global__ void __launch_bounds__(SketchTile::threads, SketchTile::resident)
    grad_project_sketch(GradProject s, Sparse at) {
  using Tile = SketchTile;
  using S = Stage<In, Tile>;
  const int64_t sample = blockIdx.x % s.samples, slab = blockIdx.x / s.samples;
  const int64_t first = at.some_tiles * slab / at.slabs, last = at.some_tiles * (slab + 1) / at.slabs;
  const int tokens = int(s.tokens);

  In *pipeline = reinterpret_cast<In *>(dynamic_shared());
  float *tile_sums = reinterpret_cast<float *>(pipeline + stages * S::elements);
  Ends *ends = reinterpret_cast<Ends *>(tile_sums + Tile::rows * tile_stride);
  float *whole = at.tables + (sample * at.slabs + slab) * s.buckets;
  float *table = at.shared_table ? reinterpret_cast<float *>(ends + Tile::threads) : whole;
  if (at.first_tile == 0 || at.shared_table)
    for (int64_t h = threadIdx.x; h < s.buckets; h += Tile::threads)
      table[h] = at.first_tile == 0 ? 0 : whole[h];

  int64_t ahead = first;
  int ahead_token = 0;
  const auto fetch = [&](int slot) {
    if (ahead < last) {
      const int64_t tile = at.first_tile + ahead, row = tile / at.col_tiles * Tile::rows;
      const int64_t col = tile % at.col_tiles * Tile::cols;
      In *to = pipeline + slot * S::elements;
      const In *a = static_cast<const In *>(s.a) + sample * s.a_sample + ahead_token * s.a_token + col;
      const In *b = static_cast<const In *>(s.b) + sample * s.b_sample + ahead_token * s.b_token + row;
      copy_stage<Tile>(to, at.a_copy, a, s.a_token, at.b_copy, b, s.b_token, tokens - ahead_token,
                       int(least(Tile::cols, s.d - col)), int(least(Tile::rows, s.p - row)));
      ahead_token += S::tokens;
      if (ahead_token >= tokens) {
        ahead_token = 0;
        ++ahead;
      }
    }
    copy_async_commit(); // an empty group too: the waits below count groups
  };
#pragma unroll 1
  for (int slot = 0; slot < stages - 1; ++slot)
    fetch(slot);

  int slot = 0;
  for (int64_t tile = first; tile < last; ++tile) {
    WarpTile<Tile> grad;
    for (int token = 0; token < tokens; token += S::tokens) {
      copy_async_wait<stages - 2>();
      __syncthreads(); // everyone's copies of this slot have landed, and everyone is done with the slot before it
      fetch((slot + stages - 1) % stages);
      grad.add_product(pipeline + slot * S::elements);
      slot = (slot + 1) % stages;
    }
    grad.for_each_pair([&](float x, float y, int r, int c) {
      tile_sums[r * tile_stride + c] = x;
      tile_sums[r * tile_stride + c + 1] = y;
    });
    __syncthreads(); // the whole tile is there
    for (int64_t j = 0; j < s.nonzeros; ++j) {
      const int64_t list = (tile * s.nonzeros + j) * tile_elements;
      add_to_table(at.lists.buckets + list, at.lists.places + list, tile_sums, ends, table);
    }
  }
  if (at.shared_table)
    for (int64_t h = threadIdx.x; h < s.buckets; h += Tile::threads)
      whole[h] = table[h];
}

__global__ void __launch_bounds__(threads) grad_project_sum_slabs(GradProject s, Sparse at, double scale) {
  const int64_t number = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int64_t sample = number / s.buckets, bucket = number % s.buckets;
  if (sample >= s.samples)
    return;
  double sum = 0;
  for (int64_t slab = 0; slab < at.slabs; ++slab)
    sum += at.tables[(sample * at.slabs + slab) * s.buckets + bucket];
  static_cast<float *>(s.out)[number] = float(sum * scale);
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

// `workspace` may be null, to learn how many bytes are needed.
Sparse plan_sparse(const GradProject &s, char *workspace, int64_t &bytes) {
  constexpr int64_t lists_bytes = 64 << 20, table_buckets = 8192; // 32 KiB: two blocks have room on most cards
  constexpr int64_t list_bytes = tile_elements * int64_t(sizeof(uint32_t) + sizeof(uint16_t));
  Sparse at{};
  at.col_tiles = ceil_div(s.d, SketchTile::cols);
  at.tiles = at.col_tiles * ceil_div(s.p, SketchTile::rows);
  at.some_tiles = least(at.tiles, most(1, lists_bytes / (list_bytes * s.nonzeros)));
  // Tables shall not outgrow what is added to them.
  at.slabs = least(ceil_div(wanted_blocks, s.samples), most(1, at.tiles * tile_elements / s.buckets));
  at.slabs = least(at.slabs, at.some_tiles);
  at.shared_table = s.buckets <= table_buckets;
  at.a_copy = copy_bytes(s.a, s.a_sample, s.a_token, size_of(s.dtype));
  at.b_copy = copy_bytes(s.b, s.b_sample, s.b_token, size_of(s.dtype));
  const int64_t elements = at.some_tiles * s.nonzeros * tile_elements;
  at.lists.buckets = reinterpret_cast<uint32_t *>(workspace);
  at.lists.places = reinterpret_cast<uint16_t *>(workspace + elements * int64_t(sizeof(uint32_t)));
  bytes = at.some_tiles * s.nonzeros * list_bytes;
  at.tables = reinterpret_cast<float *>(workspace + bytes);
  bytes += s.samples * at.slabs * s.buckets * int64_t(sizeof(float));
  return at;
}

template <class In> cudaError_t run_sparse(const GradProject &s, char *workspace, void *stream) {
  int64_t bytes = 0;
  Sparse at = plan_sparse(s, workspace, bytes);
  const int64_t some_lists = at.some_tiles * s.nonzeros, results = s.samples * s.buckets;
  if (most(most(s.tokens, s.samples * at.slabs), most(some_lists, ceil_div(results, threads))) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  constexpr int64_t list_shared =
      tile_elements * 4 + (digits * list_warps + 2 * digits) * 4 + 2 * tile_elements * int64_t(sizeof(uint16_t));
  constexpr int64_t sketch_shared = stages * Stage<In, SketchTile>::elements * int64_t(sizeof(In)) +
                                    SketchTile::rows * tile_stride * 4 + SketchTile::threads * int64_t(sizeof(Ends));
  const int64_t table = at.shared_table ? s.buckets * 4 : 0;
  const int64_t chunk = at.some_tiles;
  for (; at.first_tile < at.tiles; at.first_tile += chunk) {
    at.some_tiles = least(chunk, at.tiles - at.first_tile);
    cudaError_t error = launch(grad_project_list, at.some_tiles * s.nonzeros, threads, list_shared, stream, s, at);
    if (error == cudaSuccess)
      error = launch(grad_project_sketch<In>, s.samples * at.slabs, SketchTile::threads, sketch_shared + table, stream,
                     s, at);
    if (error != cudaSuccess)
      return error;
  }
  return launch(grad_project_sum_slabs, ceil_div(results, threads), threads, 0, stream, s, at,
                1 / std::sqrt(double(s.nonzeros)));
}

template <class In> cudaError_t run(const GradProject &s, char *workspace, void *stream) {
  return s.kind == GradProject::Kind::sparse ? run_sparse<In>(s, workspace, stream)
                                             : run_kronecker<In>(s, workspace, stream);
}

int64_t results_of(const GradProject &s) {
  return s.samples * (s.kind == GradProject::Kind::sparse ? s.buckets : s.k_out * s.k_in);
}

bool is_empty(const GradProject &s) { return !s.tokens || !s.d || !s.p; }

} // namespace

int64_t grad_project_cuda_workspace(const GradProject &s) {
  if (!results_of(s) || is_empty(s))
    return 0;
  int64_t bytes = 0;
  if (s.kind == GradProject::Kind::sparse)
    plan_sparse(s, nullptr, bytes);
  else
    plan_kronecker(s, nullptr, bytes);
  return bytes;
}

int grad_project_cuda(const GradProject &s, void *workspace, void *stream) {
  if (s.dtype == DType::f64)
    return cudaErrorNotSupported;
  const int64_t results = results_of(s);
  if (!results)
    return cudaSuccess;
  if (is_empty(s))
    return zero(s.out, results * 4, stream);
  char *scratch = static_cast<char *>(workspace);
  if (s.dtype == DType::f32)
    return run<float>(s, scratch, stream);
  return s.dtype == DType::bf16 ? run<bf16>(s, scratch, stream) : run<f16>(s, scratch, stream);
}

} // namespace gg
