// embedding_stats: (id, token) pairs are sorted per sample, so that equal ids become neighbours; warps then sum the
// rows of b of equal pieces of that order, whatever the ids are, and use a row's sum at once. Rows that go on in the
// next piece are left at its edge and joined afterwards. What bounds it: reading b, and the rows of D, once. See
// docs/gpu/embedding_stats.md.
#include "core/columns.cuh"
#include "core/launch.cuh"
#include "embedding_stats/embedding_stats.h"
#include <utility>

namespace gg {
namespace {

constexpr int warps = 8, threads = 32 * warps, resident = 2;
constexpr int together = 4;            // rows whose loads are in flight at once
constexpr int piece_tokens = 64;       // a warp's; an edge is two float32 rows per piece, 1/16 of a bfloat16 b
constexpr int most_sorted = 2048;      // pairs that a block sorts, in 24 KiB
constexpr int directions_at_once = 32; // a lane keeps one dot

// Sorting keys: an id, or what comes after all ids. Padding adds nothing, an id out of range makes its sample NaN.
using Key = uint64_t;
constexpr Key out_of_range = ~Key{1}, padding = ~Key{0};

// How the work is cut; a function of the shapes alone, and with the ids it decides the bits of the results.
struct Plan {
  int64_t sorted;        // samples with ids of their own: those that share them by stride 0 are sorted once
  int64_t chunk, merges; // tokens sorted by a block, a power of two; how often pairs of chunks are merged
  int64_t pieces, slabs, row_columns, passes; // of a sample, of a row, of a row in memory, over directions
};

// [sample with ids of its own][place in the order of (id, token)]
struct Pairs {
  Key *keys;
  int32_t *tokens;
};

// Where a block finds things.
template <class Acc> struct Launch {
  Plan plan;
  bool whole;              // whether rows of b are whole numbers of aligned 16-byte loads
  bool directions_aligned; // whether D allows such loads
  Pairs pairs;             // in their final order
  Acc *edges;              // [sample][piece][begins in an earlier piece, begins here][column]
  Acc *partials;           // [sample][1 + directions][piece][slab]
};

__device__ __forceinline__ Key key_of(const EmbeddingStats &s, int64_t sample, int64_t token) {
  const int64_t at = sample * s.id_sample + token * s.id_token;
  const int64_t id =
      s.id_dtype == DType::i32 ? static_cast<const int32_t *>(s.ids)[at] : static_cast<const int64_t *>(s.ids)[at];
  if (id == s.padding_idx && id >= 0)
    return padding;
  return id < 0 || id >= s.rows ? out_of_range : Key(id);
}

// A block sorts a chunk of a sample: by ids, then by tokens (a bitonic network).
__global__ void __launch_bounds__(threads, resident)
    embedding_stats_sort_chunk(EmbeddingStats s, int chunk, Pairs sorted) {
  const int64_t chunks = ceil_div(s.tokens, chunk), sample = blockIdx.x / chunks;
  const int first = int(blockIdx.x % chunks) * chunk;
  Key *keys = reinterpret_cast<Key *>(dynamic_shared());
  int32_t *tokens = reinterpret_cast<int32_t *>(keys + chunk);
  for (int i = int(threadIdx.x); i < chunk; i += threads) {
    keys[i] = first + i < s.tokens ? key_of(s, sample, first + i) : padding; // what does not exist stays the last
    tokens[i] = first + i;
  }
  __syncthreads();
  for (int span = 2; span <= chunk; span *= 2)
    for (int step = span / 2; step > 0; step /= 2) {
      for (int pair = int(threadIdx.x); pair < chunk / 2; pair += threads) {
        const int low = 2 * pair - (pair & (step - 1)), high = low + step;
        const Key low_key = keys[low], high_key = keys[high];
        const int32_t low_token = tokens[low], high_token = tokens[high];
        const bool falling = high_key < low_key || (high_key == low_key && high_token < low_token);
        if (falling == ((low & span) == 0)) {
          keys[low] = high_key, keys[high] = low_key;
          tokens[low] = high_token, tokens[high] = low_token;
        }
      }
      __syncthreads();
    }
  for (int i = int(threadIdx.x); i < chunk && first + i < s.tokens; i += threads) {
    sorted.keys[sample * s.tokens + first + i] = keys[i];
    sorted.tokens[sample * s.tokens + first + i] = tokens[i];
  }
}

// Merges neighbouring runs of `run` sorted pairs: a thread finds how many of the other run come before its pair.
// Tokens of the left run are smaller, so that equal ids of the right one come after.
__global__ void __launch_bounds__(threads, resident)
    embedding_stats_merge_runs(EmbeddingStats s, int64_t samples, int64_t run, Pairs from, Pairs to) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x, sample = i / s.tokens, place = i % s.tokens;
  if (sample >= samples)
    return;
  const Key *keys = from.keys + sample * s.tokens, key = keys[place];
  const bool right = place / run % 2;
  const int64_t other = (place / run + (right ? -1 : 1)) * run, end = least(s.tokens, other + run);
  int64_t low = other, high = most(other, end);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (right ? keys[middle] <= key : keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  const int64_t merged = sample * s.tokens + place - (right ? run : 0) + (low - other);
  to.keys[merged] = key;
  to.tokens[merged] = from.tokens[i];
}

// What a warp does: a piece of a sample's order, a slab of columns, some directions.
template <class In, class Dir> struct Piece {
  using Acc = sum_of<In>;
  static constexpr int n = Vector<In>::size;
  const EmbeddingStats &s;
  const Launch<Acc> &at;
  int lane, piece, left; // columns of the thread that exist
  int64_t slab, sample, col, first_direction;
  const Key *keys;
  const int32_t *order;
  bool exists;

  // The sums over the rows that are complete: the thread's share of squares, and lane k's of direction k.
  Acc squares = 0, dot = 0;

  __device__ Piece(const EmbeddingStats &s, const Launch<Acc> &at) : s(s), at(at), lane(int(threadIdx.x) % 32) {
    const Plan &plan = at.plan;
    const int64_t warp = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
    slab = warp % plan.slabs, piece = int(warp / plan.slabs % plan.pieces);
    sample = warp / plan.slabs / plan.pieces % s.samples;
    first_direction = warp / plan.slabs / plan.pieces / s.samples * directions_at_once;
    exists = first_direction < plan.passes * directions_at_once;
    col = (slab * 32 + lane) * n;
    left = int(most(0, least(n, s.features - col)));
    const int64_t sorted = plan.sorted == 1 ? 0 : sample;
    keys = at.pairs.keys + sorted * s.tokens;
    order = at.pairs.tokens + sorted * s.tokens;
  }

  __device__ int first() const { return piece * piece_tokens; }
  __device__ int last() const { return int(least(s.tokens, first() + piece_tokens)); }
  __device__ bool goes_on(int r) const { return r > 0 && r < s.tokens && keys[r - 1] == keys[r]; } // a row, at r
  __device__ int64_t directions() const { return least(s.directions - first_direction, directions_at_once); }

  __device__ Acc *edge(int which, int begins_here) const {
    return at.edges + ((sample * at.plan.pieces + which) * 2 + begins_here) * at.plan.row_columns + col;
  }

  __device__ __forceinline__ void leave(const Acc (&row)[n], int begins_here) const {
    Acc *to = edge(piece, begins_here);
    if (left > 0)
#pragma unroll
      for (int j = 0; j < n; ++j)
        to[j] = row[j];
  }

  // A complete row of the gradient: the one of this id.
  __device__ __forceinline__ void use(const Acc (&row)[n], Key id) {
#pragma unroll
    for (int j = 0; j < n; ++j)
      squares += row[j] * row[j];
#pragma unroll 1
    for (int k = 0; k < int(directions()); ++k) {
      const Dir *direction =
          static_cast<const Dir *>(s.D) + (first_direction + k) * s.D_direction + int64_t(id) * s.D_row + col;
      Acc D[n], product = 0;
      if (at.directions_aligned && left == n)
        load_columns<true>(direction, left, D);
      else
        load_columns<false>(direction, left, D);
#pragma unroll
      for (int j = 0; j < n; ++j)
        product += row[j] * D[j];
      product = sum_over_warp(product);
      dot += lane == k ? product : 0;
    }
  }

  template <bool whole> __device__ __forceinline__ void sum_rows() {
    const In *b = static_cast<const In *>(s.b) + sample * s.b_sample + (left > 0 ? col : 0);
    const int end = last();
    bool begins_here = !goes_on(first()), open = false;
    Acc row[n] = {};
    for (int r = first(); r < end; r += together) {
      Acc loaded[together][n];
      Key key[together];
      int32_t token[together];
#pragma unroll
      for (int k = 0; k < together; ++k) {
        const int place = int(least(r + k, end - 1));
        key[k] = r + k < end ? keys[place] : padding, token[k] = order[place];
      }
#pragma unroll
      for (int k = 0; k < together; ++k) // without branches between the loads: what is too much is not used
        load_columns<whole, true>(b + token[k] * s.b_token, left, loaded[k]);
      if (key[0] == padding)
        break;
#pragma unroll
      for (int k = 0; k < together; ++k) {
        if (key[k] == out_of_range)
          squares = dot = float_of_bits(0x7fc00000u);
        if (key[k] >= out_of_range)
          continue;
#pragma unroll
        for (int j = 0; j < n; ++j)
          row[j] += left > 0 ? loaded[k][j] : 0;
        open = goes_on(r + k + 1);
        if (open)
          continue;
        begins_here ? use(row, key[k]) : leave(row, 0);
        begins_here = true;
#pragma unroll
        for (int j = 0; j < n; ++j)
          row[j] = 0;
      }
    }
    if (open)
      leave(row, begins_here);
  }

  // Adds the parts of the row that begins in this piece and goes on in later ones.
  __device__ __forceinline__ void join() {
    const int end = last();
    if (!goes_on(end) || keys[end] >= out_of_range || (goes_on(first()) && keys[first()] == keys[end]))
      return;
    const Key id = keys[end];
    Acc row[n] = {};
    if (left > 0)
      load_columns<true>(edge(piece, 1), n, row);
    bool more = true;
    for (int next = piece + 1; more; next += together) {
      bool same[together];
      Acc part[together][n];
#pragma unroll
      for (int k = 0; k < together; ++k) {
        const int other = int(least(next + k, at.plan.pieces - 1));
        same[k] = next + k < at.plan.pieces && keys[other * piece_tokens] == id;
        if (left > 0)
          load_columns<true>(edge(other, 0), n, part[k]);
      }
#pragma unroll
      for (int k = 0; k < together; ++k)
        if (same[k] && left > 0)
#pragma unroll
          for (int j = 0; j < n; ++j)
            row[j] += part[k][j];
      more = same[together - 1];
    }
    use(row, id);
  }

  // Writes this warp's shares of norms2 and dots, or adds them to those of an earlier kernel.
  __device__ __forceinline__ void put(bool add) {
    const int64_t shares = at.plan.pieces * at.plan.slabs;
    Acc *to = at.partials + sample * (1 + s.directions) * shares + piece * at.plan.slabs + slab;
    squares = sum_over_warp(squares);
    if (lane == 0 && first_direction == 0)
      to[0] = add ? to[0] + squares : squares;
    to += (1 + first_direction + lane) * shares;
    if (lane < directions())
      to[0] = add ? to[0] + dot : dot;
  }
};

template <class In, class Dir>
__global__ void __launch_bounds__(threads, resident)
    embedding_stats_sum_pieces(EmbeddingStats s, Launch<sum_of<In>> at) {
  Piece<In, Dir> piece(s, at);
  if (!piece.exists)
    return;
  if (at.whole) // the same for all lanes: there are sums over the warp inside
    piece.template sum_rows<true>();
  else
    piece.template sum_rows<false>();
  piece.put(false);
}

template <class In, class Dir>
__global__ void __launch_bounds__(threads, resident)
    embedding_stats_join_pieces(EmbeddingStats s, Launch<sum_of<In>> at) {
  Piece<In, Dir> piece(s, at);
  if (!piece.exists)
    return;
  piece.join();
  piece.put(true);
}

// A warp per number: norms2 and dots from their shares of all pieces and slabs, in float64.
template <class Acc>
__global__ void __launch_bounds__(threads, resident) embedding_stats_sum_shares(EmbeddingStats s, Launch<Acc> at) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t number = (int64_t(blockIdx.x) * threads + threadIdx.x) / 32, shares = at.plan.pieces * at.plan.slabs;
  const int64_t sample = number / (1 + s.directions), q = number % (1 + s.directions);
  if (sample >= s.samples)
    return;
  double sum = 0;
  for (int64_t share = lane; share < shares; share += 32)
    sum += at.partials[number * shares + share];
  sum = sum_over_warp(sum);
  if (lane != 0)
    return;
  if (q > 0)
    static_cast<Acc *>(s.dots)[sample * s.directions + q - 1] = Acc(sum);
  else if (s.norms2)
    static_cast<Acc *>(s.norms2)[sample] = Acc(sum);
}

// ---------------------------------------------------------------------------------------------------------------------

bool is_empty(const EmbeddingStats &s) { return !s.samples || !s.tokens || !s.features; }

int64_t sum_bytes(const EmbeddingStats &s) { return s.dtype == DType::f64 ? 8 : 4; }

Plan plan_of(const EmbeddingStats &s) {
  Plan plan{};
  plan.sorted = s.id_sample == 0 ? 1 : s.samples;
  for (plan.chunk = 1; plan.chunk < least(s.tokens, most_sorted);)
    plan.chunk *= 2;
  for (int64_t run = plan.chunk; run < s.tokens; run *= 2)
    ++plan.merges;
  const int64_t columns = 16 / size_of(s.dtype);
  plan.pieces = ceil_div(s.tokens, piece_tokens), plan.slabs = ceil_div(s.features, 32 * columns);
  plan.row_columns = ceil_div(s.features, columns) * columns;
  plan.passes = most(1, ceil_div(s.directions, directions_at_once));
  return plan;
}

int64_t edges_of(const EmbeddingStats &s, const Plan &plan) {
  return plan.pieces > 1 ? s.samples * plan.pieces * 2 * plan.row_columns : 0;
}

int64_t partials_of(const EmbeddingStats &s, const Plan &plan) {
  return s.samples * (1 + s.directions) * plan.pieces * plan.slabs;
}

int64_t pairs_of(const EmbeddingStats &s, const Plan &plan) { return plan.sorted * s.tokens; }

template <class In, class Dir> cudaError_t run(const EmbeddingStats &s, void *workspace, void *stream) {
  using Acc = sum_of<In>;
  Launch<Acc> at{};
  const Plan &plan = at.plan = plan_of(s);
  at.whole = allows_16(s.b, s.b_sample, s.b_token, sizeof(In)) && s.features % Vector<In>::size == 0;
  at.directions_aligned = allows_16(s.D, s.D_direction, s.D_row, sizeof(Dir));
  const int64_t pairs = pairs_of(s, plan);
  at.edges = static_cast<Acc *>(workspace);
  Pairs from, to; // merges go to and fro
  from.keys = reinterpret_cast<Key *>(at.edges + edges_of(s, plan));
  to.keys = from.keys + (plan.merges ? pairs : 0);
  at.partials = reinterpret_cast<Acc *>(to.keys + pairs);
  from.tokens = reinterpret_cast<int32_t *>(at.partials + partials_of(s, plan));
  to.tokens = from.tokens + (plan.merges ? pairs : 0);

  constexpr int64_t pair_bytes = sizeof(Key) + sizeof(int32_t);
  cudaError_t error = launch(embedding_stats_sort_chunk, plan.sorted * ceil_div(s.tokens, plan.chunk), threads,
                             plan.chunk * pair_bytes, stream, s, plan.chunk, from);
  for (int64_t run = plan.chunk; run < s.tokens && error == cudaSuccess; run *= 2) {
    error =
        launch(embedding_stats_merge_runs, ceil_div(pairs, threads), threads, 0, stream, s, plan.sorted, run, from, to);
    std::swap(from, to);
  }
  at.pairs = from;
  const int64_t blocks = ceil_div(plan.passes * s.samples * plan.pieces * plan.slabs, warps);
  if (error == cudaSuccess)
    error = launch(embedding_stats_sum_pieces<In, Dir>, blocks, threads, 0, stream, s, at);
  if (error == cudaSuccess && plan.pieces > 1)
    error = launch(embedding_stats_join_pieces<In, Dir>, blocks, threads, 0, stream, s, at);
  if (error == cudaSuccess)
    error = launch(embedding_stats_sum_shares<Acc>, ceil_div(s.samples * (1 + s.directions), warps), threads, 0, stream,
                   s, at);
  return error;
}

template <class In> cudaError_t run(const EmbeddingStats &s, void *workspace, void *stream) {
  const bool wide = s.directions == 0 || s.direction_dtype != s.dtype;
  return wide ? run<In, sum_of<In>>(s, workspace, stream) : run<In, In>(s, workspace, stream);
}

} // namespace

int64_t embedding_stats_cuda_workspace(const EmbeddingStats &s) {
  if (is_empty(s))
    return 0;
  const Plan plan = plan_of(s);
  const int64_t pair_bytes = (sizeof(Key) + sizeof(int32_t)) * (plan.merges ? 2 : 1);
  const int64_t bytes = (edges_of(s, plan) + partials_of(s, plan)) * sum_bytes(s) + pairs_of(s, plan) * pair_bytes;
  return ceil_div(bytes, 16) * 16;
}

int embedding_stats_cuda(const EmbeddingStats &s, void *workspace, void *stream) {
  if (is_empty(s)) {
    const cudaError_t error = zero(s.norms2, s.samples * sum_bytes(s), stream);
    return error == cudaSuccess ? zero(s.dots, s.samples * s.directions * sum_bytes(s), stream) : error;
  }
  const Plan plan = plan_of(s);
  if (most(plan.passes * s.samples * plan.pieces * plan.slabs, pairs_of(s, plan)) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  return by_dtype(s.dtype, [&](auto element) { return run<decltype(element)>(s, workspace, stream); });
}

} // namespace gg
