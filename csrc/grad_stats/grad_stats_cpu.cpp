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

// A task owns up to `group_tiles` row tiles: its panels of b stay in L2 while all of a streams past them.
constexpr int group_tiles = 4;
constexpr int64_t b_panel_bytes = 1 << 20;
// When there are too few row groups to feed a pool, the columns are cut too (each cut packs its b again).
constexpr int64_t wanted_tasks = 64;
constexpr int64_t least_col_tiles = 4;

// acc = sum_t b_t a_t^T over one sample; `a` is a [tokens][tile_cols] panel, `b` a [tokens][tile_rows] one.
template <class Acc>
inline void tile_product(const Acc *__restrict a, const Acc *__restrict b, int64_t tokens,
                         vec<Acc> (&acc)[tile_rows][tile_vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v)
      acc[r][v] = vec<Acc>{};
  for (int64_t t = 0; t < tokens; ++t) {
    vec<Acc> x[tile_vectors];
#pragma GCC unroll 2
    for (int v = 0; v < tile_vectors; ++v)
      x[v] = load(a + t * tile_cols<Acc> + v * lanes<Acc>);
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r) {
      const vec<Acc> y = vec<Acc>{} + b[t * tile_rows + r];
#pragma GCC unroll 2
      for (int v = 0; v < tile_vectors; ++v)
        acc[r][v] += y * x[v];
    }
  }
}

// Scratch of one task: a row group's tile of dW, and the same tile of every direction.
template <class Acc> struct Tiles {
  static constexpr int64_t stride = group_tiles * tile_rows * tile_cols<Acc>;
  static constexpr int64_t row(int64_t r) { return r * tile_cols<Acc>; }
};

template <class In, class Acc> class Kernel {
public:
  explicit Kernel(const GradStats &args) : s(args) {
    rows_per_group = group_tiles * tile_rows;
    while (rows_per_group > tile_rows && s.tokens * rows_per_group * int64_t(sizeof(Acc)) > b_panel_bytes)
      rows_per_group -= tile_rows;
    const int64_t sample_bytes = most(1, s.tokens * rows_per_group * int64_t(sizeof(Acc)));
    samples_per_pass = most(1, b_panel_bytes / sample_bytes);
    row_groups = ceil_div(s.p, rows_per_group);
    col_tiles = ceil_div(s.d, tile_cols<Acc>);
    const int64_t cuts = least(ceil_div(wanted_tasks, most(1, row_groups)), most(1, col_tiles / least_col_tiles));
    tiles_per_cut = most(1, ceil_div(col_tiles, cuts));
    col_cuts = ceil_div(col_tiles, tiles_per_cut);
  }

  void run() {
    static thread_local Workspace packed_space, partial_space;
    packed = packed_space.get<Acc>(s.samples * s.tokens * col_tiles * tile_cols<Acc>);
    const int64_t tasks = row_groups * col_cuts;
    partials = partial_space.get<double>(tasks * s.samples * (1 + s.directions));
    parallel_for(s.samples * col_tiles, [this](int64_t i) { pack_a(i / col_tiles, i % col_tiles); });
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
  Acc *a_panel(int64_t i, int64_t tile) const {
    return packed + (i * col_tiles + tile) * s.tokens * tile_cols<Acc>;
  }

  void pack_a(int64_t i, int64_t tile) const {
    const In *from = static_cast<const In *>(s.a) + i * s.a_sample + tile * tile_cols<Acc>;
    const int64_t n = least(tile_cols<Acc>, s.d - tile * tile_cols<Acc>);
    Acc *to = a_panel(i, tile);
    for (int64_t t = 0; t < s.tokens; ++t)
      copy_padded(from + t * s.a_token, to + t * tile_cols<Acc>, n, tile_cols<Acc>);
  }

  // [tile][tokens][tile_rows] for the rows of one group.
  void pack_b(int64_t i, int64_t row, int64_t tiles, Acc *to) const {
    const In *from = static_cast<const In *>(s.b) + i * s.b_sample + row;
    for (int64_t k = 0; k < tiles; ++k, from += tile_rows) {
      const int64_t n = least(tile_rows, s.p - row - k * tile_rows);
      for (int64_t t = 0; t < s.tokens; ++t, to += tile_rows)
        copy_padded(from + t * s.b_token, to, n, tile_rows);
    }
  }

  template <class Dir>
  void load_direction(int64_t k, int64_t row, int64_t rows, int64_t col, int64_t cols, Acc *to) const {
    const Dir *from = static_cast<const Dir *>(s.D) + k * s.D_direction + row * s.D_row + col;
    std::memset(to + Tiles<Acc>::row(rows), 0, sizeof(Acc) * Tiles<Acc>::row(rows_per_group - rows));
    for (int64_t r = 0; r < rows; ++r)
      copy_padded(from + r * s.D_row, to + Tiles<Acc>::row(r), cols, tile_cols<Acc>);
  }

  void load_directions(int64_t row, int64_t rows, int64_t col, int64_t cols, Acc *to) const {
    for (int64_t k = 0; k < s.directions; ++k)
      if (s.direction_dtype == s.dtype)
        load_direction<In>(k, row, rows, col, cols, to + k * Tiles<Acc>::stride);
      else
        load_direction<Acc>(k, row, rows, col, cols, to + k * Tiles<Acc>::stride);
  }

  void tile_group(int64_t task) const {
    static thread_local Workspace b_space, tile_space;
    const int64_t row = task / col_cuts * rows_per_group, rows = least(rows_per_group, s.p - row);
    const int64_t row_tiles = ceil_div(rows, tile_rows), panel = s.tokens * tile_rows;
    const int64_t first_col = task % col_cuts * tiles_per_cut, last_col = least(col_tiles, first_col + tiles_per_cut);
    Acc *b = b_space.get<Acc>(samples_per_pass * row_tiles * panel);
    Acc *weight_grad = tile_space.get<Acc>((1 + s.directions) * Tiles<Acc>::stride);
    Acc *directions = weight_grad + Tiles<Acc>::stride;
    for (int64_t q = 0; q < s.samples * (1 + s.directions); ++q)
      partial(task, 0)[q] = 0;

    for (int64_t pass = 0; pass == 0 || pass < s.samples; pass += samples_per_pass) {
      const int64_t last = least(s.samples, pass + samples_per_pass);
      for (int64_t i = pass; i < last; ++i)
        pack_b(i, row, row_tiles, b + (i - pass) * row_tiles * panel);
      for (int64_t j = first_col; j < last_col; ++j) {
        const int64_t col = j * tile_cols<Acc>, cols = least(tile_cols<Acc>, s.d - col);
        load_directions(row, rows, col, cols, directions);
        load_weight_grad(row, rows, col, cols, pass > 0 || s.accumulate, weight_grad);
        for (int64_t i = pass; i < last; ++i)
          sample_tile(a_panel(i, j), b + (i - pass) * row_tiles * panel, row_tiles, weight_grad, directions,
                      partial(task, i));
        store_weight_grad(row, rows, col, cols, weight_grad);
      }
    }
  }

  // One sample's tiles in one row group and one column tile.
  void sample_tile(const Acc *a, const Acc *b, int64_t row_tiles, Acc *weight_grad, const Acc *directions,
                   double *sums) const {
    vec<Acc> squares[tile_vectors] = {};
    for (int64_t k = 0; k < row_tiles; ++k) {
      vec<Acc> acc[tile_rows][tile_vectors];
      tile_product<Acc>(a, b + k * s.tokens * tile_rows, s.tokens, acc);
      const int64_t at = Tiles<Acc>::row(k * tile_rows);
#pragma GCC unroll 16
      for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < tile_vectors; ++v) {
          Acc *w = weight_grad + at + Tiles<Acc>::row(r) + v * lanes<Acc>;
          store(w, load(w) + acc[r][v]);
          squares[v] += acc[r][v] * acc[r][v];
        }
      for (int64_t q = 0; q < s.directions; ++q) {
        const Acc *D = directions + q * Tiles<Acc>::stride + at;
        vec<Acc> dot[tile_vectors] = {};
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < tile_vectors; ++v)
            dot[v] += acc[r][v] * load(D + Tiles<Acc>::row(r) + v * lanes<Acc>);
        sums[1 + q] += sum_lanes<Acc>(dot[0] + dot[1]);
      }
    }
    sums[0] += sum_lanes<Acc>(squares[0] + squares[1]);
  }

  void load_weight_grad(int64_t row, int64_t rows, int64_t col, int64_t cols, bool continued, Acc *tile) const {
    std::memset(tile, 0, sizeof(Acc) * Tiles<Acc>::stride);
    if (!continued || !s.weight_grad)
      return;
    const Acc *from = static_cast<const Acc *>(s.weight_grad) + row * s.weight_grad_row + col;
    for (int64_t r = 0; r < rows; ++r)
      copy_padded(from + r * s.weight_grad_row, tile + Tiles<Acc>::row(r), cols, cols);
  }

  void store_weight_grad(int64_t row, int64_t rows, int64_t col, int64_t cols, const Acc *tile) const {
    if (!s.weight_grad)
      return;
    Acc *to = static_cast<Acc *>(s.weight_grad) + row * s.weight_grad_row + col;
    for (int64_t r = 0; r < rows; ++r, to += s.weight_grad_row)
      copy_padded(tile + Tiles<Acc>::row(r), to, cols, cols);
  }

  const GradStats &s;
  int64_t rows_per_group, samples_per_pass, row_groups, col_tiles, tiles_per_cut, col_cuts;
  Acc *packed = nullptr;
  double *partials = nullptr;
};

} // namespace

void grad_stats(const GradStats &args) {
  switch (args.dtype) {
  case DType::f32: return Kernel<float, float>(args).run();
  case DType::f64: return Kernel<double, double>(args).run();
  case DType::bf16: return Kernel<bf16, float>(args).run();
  default: return Kernel<f16, float>(args).run();
  }
}

} // namespace gg::GG_ISA
