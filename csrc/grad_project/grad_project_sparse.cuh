// Sparse sketches on tensor cores: a block forms a sample's tiles of G one after the other and adds each to a table of
// buckets, by a list of the tile's elements that is sorted by bucket once and serves all samples.
#pragma once
#include "core/launch.cuh"
#include "core/tile.cuh"
#include "grad_project/grad_project.h"
#include "grad_project/grad_project_draw.cuh"
#include <cmath>

namespace gg {
namespace {

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

} // namespace
} // namespace gg
