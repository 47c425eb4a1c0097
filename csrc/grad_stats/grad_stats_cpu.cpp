// grad_stats on the CPU: the weight-gradient GEMM, tile by tile and sample by sample, so that each sample's tile is in
// registers when its norm and dots are taken. What bounds it: the FMA units. See docs/ops/grad_stats.md.
#include "core/parallel.h"
#include "core/simd.h"
#include "core/workspace.h"
#include "grad_stats/grad_stats.h"

namespace gg::GG_ISA {
namespace {

// A tile of G is tile_rows x tile_cols: 14 x 2 vectors fill 28 of AVX-512's 32 registers, 6 x 2 fill 12 of 16.
constexpr int tile_rows = vector_registers == 32 ? 14 : 6;
constexpr int tile_vectors = 2;
template <class Acc> constexpr int tile_cols = tile_vectors * lanes<Acc>;

// A block of tokens of both panels takes half of a 48 KiB L1, a third of the tiles beside it.
template <class Acc>
constexpr int64_t block_tokens = (20 << 10) / (int64_t(sizeof(Acc)) * (tile_rows + tile_cols<Acc>));

// A task owns up to `group_tiles` row tiles: its panels of b stay in L2 while all of a streams past them.
constexpr int group_tiles = 4;
constexpr int64_t b_panel_bytes = 1 << 20;
// When there are too few row groups to feed a pool, the columns are cut too.
constexpr int64_t wanted_tasks = 16;
constexpr int64_t pack_tokens = 16;

// acc += sum_t b_t a_t^T; `a` is a [tokens][tile_cols] panel, `b` a [tokens][tile_rows] one. Meanwhile the panel of b
// that comes next is fetched into L1, and, where `next_a` is given, the panel of a.
template <class Acc, bool fetch_a>
inline void tile_product(const Acc *__restrict a, const Acc *__restrict b, const Acc *next_a, const Acc *next_b,
                         int64_t tokens, vec<Acc> (&acc)[tile_rows][tile_vectors]) {
  for (int64_t t = 0; t < tokens; ++t) {
    vec<Acc> x[tile_vectors];
    __builtin_prefetch(next_b + t * tile_rows);
    if constexpr (fetch_a)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v)
        __builtin_prefetch(next_a + t * tile_cols<Acc> + v * lanes<Acc>);
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v)
      x[v] = load(a + t * tile_cols<Acc> + v * lanes<Acc>);
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r) {
      const vec<Acc> y = splat(b[t * tile_rows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v)
        acc[r][v] += y * x[v];
    }
  }
}

// D is read and dW written some column tiles at a time: their rows lie pages apart, and each visit costs a page walk.
constexpr int block_tiles = 2;
template <class Acc> constexpr int block_cols = block_tiles * tile_cols<Acc>;

// Scratch of one task: a row group's block of unfinished sums, of dW, and of every direction.
template <class Acc> struct Block {
  static constexpr int64_t row(int64_t r) { return r * block_cols<Acc>; }
  static constexpr int64_t size = row(group_tiles * tile_rows);
};

template <class In, class Acc> class Kernel {
public:
  explicit Kernel(const GradStats &args) : s(args) {
    tokens_per_block = most(1, ceil_div(s.tokens, most(1, ceil_div(s.tokens, block_tokens<Acc>))));
    rows_per_group = group_tiles * tile_rows;
    while (rows_per_group > tile_rows && s.tokens * rows_per_group * int64_t(sizeof(Acc)) > b_panel_bytes)
      rows_per_group -= tile_rows;
    const int64_t sample_bytes = most(1, s.tokens * rows_per_group * int64_t(sizeof(Acc)));
    samples_per_pass = most(1, b_panel_bytes / sample_bytes);
    row_tiles = ceil_div(s.p, tile_rows);
    row_groups = ceil_div(s.p, rows_per_group);
    col_tiles = ceil_div(s.d, tile_cols<Acc>);
    const int64_t cuts = most(1, least(ceil_div(wanted_tasks, most(1, row_groups)), col_tiles));
    tiles_per_cut = most(1, ceil_div(col_tiles, cuts));
    col_cuts = ceil_div(col_tiles, tiles_per_cut);
  }

  void run() {
    static thread_local Workspace panel_space, partial_space;
    a_panels = panel_space.get<Acc>(s.samples * s.tokens * (col_tiles * tile_cols<Acc> + row_tiles * tile_rows));
    b_panels = a_panels + s.samples * s.tokens * col_tiles * tile_cols<Acc>;
    const int64_t tasks = row_groups * col_cuts;
    partials = partial_space.get<double>(tasks * s.samples * (1 + s.directions));
    const int64_t packs = ceil_div(s.tokens, pack_tokens);
    parallel_for(2 * s.samples * packs, [=, this](int64_t task) {
      const int64_t i = task / 2 / packs, first = task / 2 % packs * pack_tokens;
      const int64_t last = least(s.tokens, first + pack_tokens);
      task % 2 ? pack_b(i, first, last) : pack_a(i, first, last);
    });
    parallel_for(tasks, [this](int64_t task) { tile_group(task); });
    for (int64_t i = 0; i < s.samples; ++i)
      for (int64_t q = 0; q <= s.directions; ++q) {
        double sum = 0;
        for (int64_t task = 0; task < tasks; ++task)
          sum += partial(task, i)[q];
        if (q > 0)
          static_cast<Acc *>(s.dots)[i * s.directions + q - 1] = static_cast<Acc>(sum);
        else if (s.norms2)
          static_cast<Acc *>(s.norms2)[i] = static_cast<Acc>(sum);
      }
  }

private:
  double *partial(int64_t task, int64_t i) const { return partials + (task * s.samples + i) * (1 + s.directions); }
  Acc *a_panel(int64_t i, int64_t tile) const { return a_panels + (i * col_tiles + tile) * s.tokens * tile_cols<Acc>; }
  Acc *b_panel(int64_t i, int64_t tile) const { return b_panels + (i * row_tiles + tile) * s.tokens * tile_rows; }

  // Panels are [sample][tile][token][column of the tile]. A pack takes a few tokens across all tiles: token by token it
  // would touch every panel's page each time, tile by tile every token's.
  void pack_a(int64_t i, int64_t first, int64_t last) const {
    const In *from = static_cast<const In *>(s.a) + i * s.a_sample;
    for (int64_t j = 0; j < col_tiles; ++j) {
      const int64_t col = j * tile_cols<Acc>, cols = least(tile_cols<Acc>, s.d - col);
      for (int64_t t = first; t < last; ++t)
        copy_row<tile_cols<Acc>>(from + t * s.a_token + col, a_panel(i, j) + t * tile_cols<Acc>, cols);
    }
  }

  // Whole vectors are copied while the row has them: what they spill past a panel's row is overwritten by the next
  // token, so the last one is copied to measure.
  void pack_b(int64_t i, int64_t first, int64_t last) const {
    constexpr int64_t whole = ceil_div(tile_rows, lanes<Acc>) * lanes<Acc>;
    const In *from = static_cast<const In *>(s.b) + i * s.b_sample;
    for (int64_t k = 0; k < row_tiles; ++k) {
      const int64_t row = k * tile_rows;
      int64_t t = first;
      Acc *to = b_panel(i, k) + first * tile_rows;
      if (row + whole <= s.p)
        for (; t + 1 < last; ++t, to += tile_rows)
          for (int64_t v = 0; v < whole; v += lanes<Acc>)
            store(to + v, load_wide(from + t * s.b_token + row + v));
      for (; t < last; ++t, to += tile_rows)
        copy_padded(from + t * s.b_token + row, to, least(tile_rows, s.p - row), tile_rows);
    }
  }

  template <class Dir>
  void load_direction(int64_t k, int64_t row, int64_t rows, int64_t col, int64_t cols, Acc *to) const {
    const Dir *from = static_cast<const Dir *>(s.D) + k * s.D_direction + row * s.D_row + col;
    std::memset(to + Block<Acc>::row(rows), 0, sizeof(Acc) * Block<Acc>::row(rows_per_group - rows));
    for (int64_t r = 0; r < rows; ++r)
      copy_row<block_cols<Acc>>(from + r * s.D_row, to + Block<Acc>::row(r), cols);
  }

  void load_directions(int64_t row, int64_t rows, int64_t col, int64_t cols, Acc *to) const {
    for (int64_t k = 0; k < s.directions; ++k)
      if (s.direction_dtype == s.dtype)
        load_direction<In>(k, row, rows, col, cols, to + k * Block<Acc>::size);
      else
        load_direction<Acc>(k, row, rows, col, cols, to + k * Block<Acc>::size);
  }

  void tile_group(int64_t task) const {
    static thread_local Workspace tile_space;
    const int64_t row = task / col_cuts * rows_per_group, rows = least(rows_per_group, s.p - row);
    const int64_t first_col = task % col_cuts * tiles_per_cut, last_col = least(col_tiles, first_col + tiles_per_cut);
    Acc *unfinished = tile_space.get<Acc>((2 + s.directions) * Block<Acc>::size);
    Acc *weight_grad = unfinished + Block<Acc>::size, *directions = weight_grad + Block<Acc>::size;
    for (int64_t q = 0; q < s.samples * (1 + s.directions); ++q)
      partial(task, 0)[q] = 0;

    for (int64_t pass = 0; pass == 0 || pass < s.samples; pass += samples_per_pass) {
      const int64_t last = least(s.samples, pass + samples_per_pass);
      for (int64_t block = first_col; block < last_col; block += block_tiles) {
        const int64_t tiles = least(block_tiles, last_col - block), col = block * tile_cols<Acc>;
        const int64_t cols = least(tiles * tile_cols<Acc>, s.d - col);
        load_directions(row, rows, col, cols, directions);
        load_weight_grad(row, rows, col, cols, pass > 0 || s.accumulate, weight_grad);
        for (int64_t j = 0; j < tiles; ++j)
          for (int64_t i = pass; i < last; ++i) {
            const int64_t next = i + 1 < last ? i + 1 : pass, next_j = i + 1 < last ? j : j + 1;
            sample_tile(a_panel(i, block + j), b_panel(i, row / tile_rows), a_panel(next, block + next_j),
                        b_panel(next, row / tile_rows), ceil_div(rows, tile_rows), unfinished,
                        weight_grad + j * tile_cols<Acc>, directions + j * tile_cols<Acc>, partial(task, i));
          }
        store_weight_grad(row, rows, col, cols, weight_grad);
      }
    }
  }

  // One sample's tiles in one row group and one column tile. Long samples go by blocks of tokens, so that the block of
  // `a` stays in L1 for all row tiles; between blocks the sums wait in `unfinished`. `next_a` and `next_b` are the
  // panels of the next sample.
  void sample_tile(const Acc *a, const Acc *b, const Acc *next_a, const Acc *next_b, int64_t tiles, Acc *unfinished,
                   Acc *weight_grad, const Acc *directions, double *sums) const {
    for (int64_t t = 0; t < s.tokens || t == 0; t += tokens_per_block) {
      const int64_t tokens = least(tokens_per_block, s.tokens - t);
      const bool finished = t + tokens >= s.tokens;
      for (int64_t k = 0; k < tiles; ++k) {
        const int64_t at = Block<Acc>::row(k * tile_rows);
        const Acc *block = a + t * tile_cols<Acc>, *b_block = b + (k * s.tokens + t) * tile_rows;
        vec<Acc> acc[tile_rows][tile_vectors];
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < tile_vectors; ++v)
            acc[r][v] = t ? load(unfinished + at + Block<Acc>::row(r) + v * lanes<Acc>) : vec<Acc>{};
        if (k + 1 < tiles)
          tile_product<Acc, false>(block, b_block, nullptr, b_block + s.tokens * tile_rows, tokens, acc);
        else
          tile_product<Acc, true>(block, b_block, finished ? next_a : block + tokens * tile_cols<Acc>,
                                  finished ? next_b : b + (t + tokens) * tile_rows, tokens, acc);
        if (finished)
          finish_tile(acc, weight_grad + at, directions + at, sums);
        else
#pragma GCC unroll 16
          for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < tile_vectors; ++v)
              store(unfinished + at + Block<Acc>::row(r) + v * lanes<Acc>, acc[r][v]);
      }
    }
  }

  static double sum_tile_row(const vec<Acc> (&x)[tile_vectors]) {
    vec<Acc> sum = x[0];
    for (int v = 1; v < tile_vectors; ++v)
      sum += x[v];
    return sum_lanes<Acc>(sum);
  }

  // A sample's finished tile of G: added to dW, squared, and dotted with the same tile of every direction.
  inline void finish_tile(const vec<Acc> (&acc)[tile_rows][tile_vectors], Acc *weight_grad, const Acc *directions,
                          double *sums) const {
    vec<Acc> squares[tile_vectors] = {};
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v) {
        Acc *w = weight_grad + Block<Acc>::row(r) + v * lanes<Acc>;
        store(w, load(w) + acc[r][v]);
        squares[v] += acc[r][v] * acc[r][v];
      }
    sums[0] += sum_tile_row(squares);
    for (int64_t q = 0; q < s.directions; ++q) {
      const Acc *D = directions + q * Block<Acc>::size;
      vec<Acc> dot[tile_vectors] = {};
#pragma GCC unroll 16
      for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v)
          dot[v] += acc[r][v] * load(D + Block<Acc>::row(r) + v * lanes<Acc>);
      sums[1 + q] += sum_tile_row(dot);
    }
  }

  void load_weight_grad(int64_t row, int64_t rows, int64_t col, int64_t cols, bool continued, Acc *tile) const {
    std::memset(tile, 0, sizeof(Acc) * Block<Acc>::size);
    if (!continued || !s.weight_grad)
      return;
    const Acc *from = static_cast<const Acc *>(s.weight_grad) + row * s.weight_grad_row + col;
    for (int64_t r = 0; r < rows; ++r)
      copy_padded(from + r * s.weight_grad_row, tile + Block<Acc>::row(r), cols, cols);
  }

  void store_weight_grad(int64_t row, int64_t rows, int64_t col, int64_t cols, const Acc *tile) const {
    if (!s.weight_grad)
      return;
    Acc *to = static_cast<Acc *>(s.weight_grad) + row * s.weight_grad_row + col;
    for (int64_t r = 0; r < rows; ++r, to += s.weight_grad_row)
      copy_padded(tile + Block<Acc>::row(r), to, cols, cols);
  }

  const GradStats &s;
  int64_t tokens_per_block, rows_per_group, samples_per_pass, row_tiles, row_groups, col_tiles, tiles_per_cut, col_cuts;
  Acc *a_panels = nullptr, *b_panels = nullptr;
  double *partials = nullptr;
};

} // namespace

void grad_stats(const GradStats &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
