// grad_project on the CPU. Kronecker: two GEMMs of all tokens with few columns, then one small product per sample.
// Sparse: tiles of G whose lanes are samples, scattered from registers into a table whose rows are buckets, so that one
// hash serves a whole vector of samples. What bounds it: the FMA units; for short samples, the scattering. See
// docs/ops/grad_project.md.
#include "core/log.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "core/workspace.h"
#include "grad_project/grad_project.h"

#include <cmath>

namespace gg::GG_ISA {
namespace {

constexpr int64_t wanted_tasks = 16;

// Four random words for each of the columns [col, col + draw_cols).
constexpr int draw_cols = lanes<uint64_t>;

struct Words {
  vec<uint64_t> word[4];

  Words(const GradProject &s, int64_t col, int64_t row_word, int64_t purpose) {
    for (int c = 0; c < draw_cols; ++c)
      word[0][c] = static_cast<uint64_t>(col + c);
    word[1] = splat(static_cast<uint64_t>(row_word));
    word[2] = splat(static_cast<uint64_t>(purpose));
    word[3] = splat(static_cast<uint64_t>(s.layer));
    philox4x32_10(word, s.seed);
  }
};

// ---- Random matrices ------------------------------------------------------------------------------------------------

template <class Acc> inline void draw_signs(vec<uint64_t> word, int bit, Acc *to) {
  for (int c = 0; c < draw_cols; ++c)
    to[c] = static_cast<Acc>(1 - 2 * static_cast<int>(word[c] >> bit & 1));
}

// Two vectors of independent standard normals (Box and Muller). The angle is within an eighth of a turn of a quarter,
// exactly, so that the Taylor series of cosine and sine end after 8 terms.
template <class Acc> inline void draw_normals(vec<uint64_t> w0, vec<uint64_t> w1, Acc *to0, Acc *to1) {
  const vec<double> u = (__builtin_convertvector(w0, vec<double>) + 0.5) * 0x1p-32;
  const vec<double> turns = __builtin_convertvector(w1, vec<double>) * 0x1p-30;
  const vec<uint64_t> quarter = (w1 + (1u << 29)) >> 30;
  const vec<double> x = (turns - __builtin_convertvector(quarter, vec<double>)) * 1.57079632679489661923, x2 = x * x;
  vec<double> cosine = vec<double>{} + 1, sine = cosine;
#pragma GCC unroll 8
  for (int n = 16; n > 0; n -= 2) {
    cosine = 1 - cosine * x2 * (1.0 / (n * (n - 1)));
    sine = 1 - sine * x2 * (1.0 / (n * (n + 1)));
  }
  sine *= x;
  const vec<uint64_t> odd = -(quarter & 1); // a quarter turn makes the cosine minus the sine, and the sine the cosine
  const vec<uint64_t> c = bits_of_double(cosine), s = bits_of_double(sine);
  const vec<double> c_turned = double_of_bits(((c & ~odd) | (s & odd)) ^ (((quarter + 1) & 2) << 62));
  const vec<double> s_turned = double_of_bits(((s & ~odd) | (c & odd)) ^ ((quarter & 2) << 62));
  const vec<double> minus_2_log = -2 * log_same_bits(u);
  for (int l = 0; l < draw_cols; ++l) {
    const double radius = std::sqrt(minus_2_log[l]);
    to0[l] = static_cast<Acc>(radius * c_turned[l]), to1[l] = static_cast<Acc>(radius * s_turned[l]);
  }
}

// ---- Kronecker ------------------------------------------------------------------------------------------------------

constexpr int accumulators = vector_registers == 32 ? 28 : 12;
template <int vectors> constexpr int tile_rows = accumulators / vectors;

// Tokens that are projected together, or half of them where there are few: their block of features stays in L2 while
// the panels of P pass, and whole tiles of either width fill them, or tasks would write into each other's tokens.
constexpr int group_rows = 2 * tile_rows<1>;
constexpr int64_t block_cols = 256;

// acc[r][v] += sum_s x[r][s] y[s][v]
template <class Acc, int rows, int vectors>
inline void tile_product(const Acc *__restrict x, int64_t x_row, int64_t x_step, const Acc *__restrict y,
                         int64_t y_step, int64_t steps, vec<Acc> (&acc)[rows][vectors]) {
  for (int64_t s = 0; s < steps; ++s, x += x_step, y += y_step) {
    vec<Acc> col[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v)
      col[v] = load(y + v * lanes<Acc>);
#pragma GCC unroll 28
    for (int r = 0; r < rows; ++r) {
      const vec<Acc> row = splat(x[r * x_row]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        acc[r][v] += row * col[v];
    }
  }
}

template <class In, class Acc> class Kronecker {
  // One side of the layer: its matrix, in panels [panel][column][panel's rows], and its tokens projected.
  struct Side {
    GradProject::Matrix P;
    int64_t purpose, k, n, padded_k; // n columns; padded to whole vectors
    const In *tokens;
    int64_t sample_stride, token_stride;
    Acc *panels, *projected;
  };

public:
  explicit Kronecker(const GradProject &args) : s(args) {
    const int64_t rows = s.samples * s.tokens;
    group_tokens = tile_rows<1> * (rows > wanted_tasks * tile_rows<1> ? 2 : 1);
    groups = ceil_div(rows, group_tokens);
    sides[0] = side(s.P_out, 0, s.k_out, s.p, s.b, s.b_sample, s.b_token);
    sides[1] = side(s.P_in, 1, s.k_in, s.d, s.a, s.a_sample, s.a_token);
  }

  void run() {
    static thread_local Workspace panel_space, projected_space;
    const int64_t rows = groups * group_tokens; // tiles may run past the last token
    Acc *panels = panel_space.get<Acc>(sides[0].padded_k * sides[0].n + sides[1].padded_k * sides[1].n);
    Acc *projected = projected_space.get<Acc>(rows * (sides[0].padded_k + sides[1].padded_k));
    for (Side &side : sides) {
      side.panels = panels, side.projected = projected;
      panels += side.padded_k * side.n, projected += rows * side.padded_k;
    }
    const int64_t out_panels = panels_of(sides[0]), in_panels = panels_of(sides[1]);
    parallel_for(out_panels + in_panels, [=, this](int64_t task) {
      task < out_panels ? pack_panel(sides[0], task) : pack_panel(sides[1], task - out_panels);
    });
    parallel_for(2 * groups, [this](int64_t task) { project(sides[task % 2], task / 2 * group_tokens); });
    const int64_t samples_per_task = most(1, group_rows / most(1, s.tokens));
    parallel_for(ceil_div(s.samples, samples_per_task), [=, this](int64_t task) {
      const int64_t first = task * samples_per_task;
      for (int64_t i = first; i < least(s.samples, first + samples_per_task); ++i)
        outer_products(i);
    });
  }

private:
  static Side side(const GradProject::Matrix &P, int64_t purpose, int64_t k, int64_t n, const void *tokens,
                   int64_t sample_stride, int64_t token_stride) {
    const int64_t padded_k = ceil_div(k, lanes<Acc>) * lanes<Acc>;
    return {P, purpose, k, n, padded_k, static_cast<const In *>(tokens), sample_stride, token_stride, nullptr, nullptr};
  }

  static constexpr int panel_rows = 2 * lanes<Acc>;
  static constexpr int64_t block_row =
      block_cols + lanes<Acc>; // rows a power of two apart would fight for one set of L1
  static constexpr int64_t steps_per_line = 64 / sizeof(In);
  static int64_t panels_of(const Side &side) { return ceil_div(side.padded_k, panel_rows); }
  static int64_t width(const Side &side, int64_t row) { return least(panel_rows, side.padded_k - row); }

  // Rows [row, row + panel_rows) and columns [col, col + draw_cols) of a matrix, zeros beyond its edges.
  void fill(const Side &side, int64_t row, int64_t col, Acc (&to)[panel_rows][draw_cols]) const {
    const int64_t rows = least(panel_rows, side.k - row), cols = least(draw_cols, side.n - col);
    if (side.P.data && side.P.dtype == s.dtype)
      copy_block(static_cast<const In *>(side.P.data) + row * side.P.row + col, side.P.row, rows, cols, to);
    else if (side.P.data)
      copy_block(static_cast<const Acc *>(side.P.data) + row * side.P.row + col, side.P.row, rows, cols, to);
    else if (s.kind == GradProject::Kind::rademacher)
      for (int64_t r = 0, drawn; r < rows; r += drawn) {
        drawn = least(rows - r, 128 - (row + r) % 128);
        const Words words(s, col, (row + r) / 128, side.purpose);
        for (int64_t q = r; q < r + drawn; ++q)
          draw_signs(words.word[(row + q) / 32 % 4], (row + q) % 32, to[q]);
      }
    else
      for (int64_t r = 0; r < rows; r += 4) {
        const Words words(s, col, (row + r) / 4, side.purpose);
        draw_normals(words.word[0], words.word[1], to[r], to[r + 1]);
        draw_normals(words.word[2], words.word[3], to[r + 2], to[r + 3]);
      }
    for (int64_t r = rows; r < panel_rows; ++r)
      std::memset(to[r], 0, sizeof to[r]);
  }

  template <class T>
  static void copy_block(const T *from, int64_t stride, int64_t rows, int64_t cols, Acc (&to)[panel_rows][draw_cols]) {
    for (int64_t r = 0; r < rows; ++r)
      copy_padded(from + r * stride, to[r], cols, draw_cols);
  }

  void pack_panel(const Side &side, int64_t panel) const {
    const int64_t row = panel * panel_rows, rows = width(side, row);
    Acc *to = side.panels + row * side.n;
    for (int64_t col = 0; col < side.n; col += draw_cols) {
      Acc block[panel_rows][draw_cols];
      fill(side, row, col, block);
      for (int64_t c = 0; c < least(draw_cols, side.n - col); ++c, to += rows)
        for (int64_t r = 0; r < rows; ++r)
          to[r] = block[r][c];
    }
  }

  // A group of tokens times P^T, written as [token][padded_k]. Features go by blocks; between them the sums wait in
  // their place.
  void project(const Side &side, int64_t first) const {
    static thread_local Workspace block_space;
    Acc *block = block_space.get<Acc>(group_rows * block_row);
    const int64_t tokens = least(group_tokens, s.samples * s.tokens - first);
    for (int64_t col = 0; col < side.n; col += block_cols) {
      const int64_t cols = least(block_cols, side.n - col);
      for (int64_t t = 0; t < tokens; ++t)
        copy_padded(token(side, first + t) + col, block + t * block_row, cols, cols);
      // Tiles run past the last token: what an earlier call left there may be denormal, and cost ten times the rest.
      for (int64_t t = tokens; t < group_tokens; ++t)
        std::memset(block + t * block_row, 0, sizeof(Acc) * cols);
      for (int64_t row = 0; row < side.padded_k; row += panel_rows) {
        const Acc *panel = side.panels + row * side.n + col * width(side, row);
        Acc *to = side.projected + first * side.padded_k + row;
        const In *next = row == 0 && col + block_cols < side.n ? token(side, first) + col + block_cols : nullptr;
        if (width(side, row) == panel_rows)
          project_tiles<2>(block, panel, tokens, cols, col > 0, next, side.token_stride, to, side.padded_k);
        else
          project_tiles<1>(block, panel, tokens, cols, col > 0, next, side.token_stride, to, side.padded_k);
      }
    }
  }

  const In *token(const Side &side, int64_t number) const {
    return side.tokens + number / s.tokens * side.sample_stride + number % s.tokens * side.token_stride;
  }

  // `next`, where given, is the block of features to come, which is fetched line by line meanwhile.
  template <int vectors>
  static void project_tiles(const Acc *block, const Acc *panel, int64_t tokens, int64_t cols, bool continued,
                            const In *next, int64_t next_row, Acc *to, int64_t to_row) {
    constexpr int rows = tile_rows<vectors>;
    for (int64_t t = 0; t < tokens; t += rows) {
      vec<Acc> acc[rows][vectors];
#pragma GCC unroll 28
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          acc[r][v] = continued ? load(to + (t + r) * to_row + v * lanes<Acc>) : vec<Acc>{};
      for (int64_t c = 0; c < cols; c += steps_per_line) {
        if (next)
          for (int r = 0; r < rows; ++r)
            __builtin_prefetch(next + (t + r) * next_row + c, 0, 2);
        tile_product<Acc, rows, vectors>(block + t * block_row + c, block_row, 1, panel + c * vectors * lanes<Acc>,
                                         vectors * lanes<Acc>, least(steps_per_line, cols - c), acc);
      }
#pragma GCC unroll 28
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          store(to + (t + r) * to_row + v * lanes<Acc>, acc[r][v]);
    }
  }

  void outer_products(int64_t i) const {
    for (int64_t col = 0; col < sides[1].padded_k; col += panel_rows)
      if (width(sides[1], col) == panel_rows)
        outer_tiles<2>(i, col);
      else
        outer_tiles<1>(i, col);
  }

  // Tile rows beyond k_out read what lies there, and are dropped.
  template <int vectors> void outer_tiles(int64_t i, int64_t col) const {
    constexpr int rows = tile_rows<vectors>;
    const Side &left = sides[0], &right = sides[1];
    const double made = (left.P.data ? 1.0 : double(left.k)) * (right.P.data ? 1.0 : double(right.k));
    const Acc scale = static_cast<Acc>(1 / std::sqrt(made));
    for (int64_t row = 0; row < left.k; row += rows) {
      vec<Acc> acc[rows][vectors] = {};
      tile_product<Acc, rows, vectors>(left.projected + i * s.tokens * left.padded_k + row, 1, left.padded_k,
                                       right.projected + i * s.tokens * right.padded_k + col, right.padded_k, s.tokens,
                                       acc);
      Acc *to = static_cast<Acc *>(s.out) + (i * left.k + row) * right.k + col;
      for (int r = 0; r < least(rows, left.k - row); ++r)
        for (int v = 0; v < vectors; ++v)
          if (col + (v + 1) * lanes<Acc> <= right.k)
            store(to + r * right.k + v * lanes<Acc>, acc[r][v] * scale);
          else
            for (int64_t c = v * lanes<Acc>; col + c < right.k; ++c)
              to[r * right.k + c] = acc[r][v][c - v * lanes<Acc>] * scale;
    }
  }

  const GradProject &s;
  int64_t group_tokens, groups;
  Side sides[2];
};

// ---- Sparse ---------------------------------------------------------------------------------------------------------

// Rows 2i and 2i + 1 of every 2 x 2 block of h x h blocks change their off-diagonal halves, for h = lanes / 2 to 1.
template <int h, class V, int... lane> inline void swap_halves(V &x, V &y, Lanes<lane...>) {
  constexpr int n = sizeof...(lane);
  const V low = __builtin_shufflevector(x, y, (lane % (2 * h) < h ? lane : n + lane - h)...);
  y = __builtin_shufflevector(x, y, (lane % (2 * h) < h ? lane + h : n + lane)...);
  x = low;
}

template <class T, int h = lanes<T> / 2> inline void transpose(vec<T> (&v)[lanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i)
    if (!(i & h))
      swap_halves<h>(v[i], v[i + h], typename count_lanes<lanes<T>>::type{});
  if constexpr (h > 1)
    transpose<T, h / 2>(v);
}

template <class In, class Acc> class Sparse {
  // A tile of G, each element a vector of samples: 6 x 4 and its operands take 29 of 32 registers, 4 x 3 takes 16.
  static constexpr int rows = vector_registers == 32 ? 6 : 4, cols = vector_registers == 32 ? 4 : 3;
  static constexpr int64_t row_step = rows * lanes<Acc>, col_step = cols * lanes<Acc>; // a token's elements of a panel

  // A block of tokens of b's panel stays in L1; the block's panels of a, and its unfinished sums, stay in L2.
  static constexpr int64_t block_tokens = 32;
  static constexpr int block_row_tiles = 4, block_col_tiles = 48 / cols;
  static constexpr int64_t block_rows = block_row_tiles * rows, block_cols = block_col_tiles * cols;
  static_assert(block_rows % 4 == 0 && block_cols % draw_cols == 0);

  // Hashes are drawn for a block of rows and so many columns, and used by so many groups of samples.
  static constexpr int64_t hash_bytes = 256 << 10;
  static constexpr int64_t groups_per_task = 4;

public:
  explicit Sparse(const GradProject &args) : s(args) {
    choose_pieces();
    row_tiles = ceil_div(s.p, rows);
    col_tiles = ceil_div(s.d, cols);
    row_blocks = ceil_div(row_tiles, block_row_tiles);
    span_cols = most(1, hash_bytes / (4 * s.nonzeros * block_rows) / block_cols) * block_cols;
    span_cols = least(span_cols, ceil_div(s.d, block_cols) * block_cols);
    spans = ceil_div(s.d, span_cols);
    chunks = ceil_div(groups, groups_per_task);
    const int64_t units = row_blocks * spans;
    units_per_task = ceil_div(units, least(units, ceil_div(wanted_tasks, chunks)));
    cuts = ceil_div(units, units_per_task);
  }

  void run() {
    static thread_local Workspace panel_space, table_space;
    a_panels = panel_space.get<Acc>(groups * tokens * lanes<Acc> * (col_tiles * cols + row_tiles * rows));
    b_panels = a_panels + groups * col_tiles * tokens * col_step;
    tables = table_space.get<Acc>(cuts * groups * s.buckets * lanes<Acc>);
    parallel_for(groups * tokens, [this](int64_t task) { pack(task / tokens, task % tokens); });
    parallel_for(chunks * cuts, [this](int64_t task) { sketch(task / cuts, task % cuts); });
    constexpr int64_t finished_together = 64;
    parallel_for(ceil_div(s.buckets, finished_together), [=, this](int64_t task) {
      const int64_t first = task * finished_together;
      for (int64_t h = first; h < least(s.buckets, first + finished_together); ++h)
        finish(h);
    });
  }

private:
  // Lanes are samples; where these do not fill whole vectors, equal pieces of samples: a sketch of a sum is the sum of
  // the sketches. Of all numbers of pieces the cheapest, counting a scatter as so many multiply-adds.
  void choose_pieces() {
    constexpr int64_t scatter_cost = 5;
    int64_t best = INT64_MAX;
    for (int64_t n = 1; n <= least(lanes<Acc>, s.tokens); ++n) {
      const int64_t vectors = ceil_div(s.samples * n, lanes<Acc>), length = ceil_div(s.tokens, n);
      if (const int64_t cost = vectors * (length + scatter_cost * s.nonzeros); cost < best)
        best = cost, pieces = n, groups = vectors, tokens = length;
    }
  }

  Acc *a_panel(int64_t g, int64_t tile) const { return a_panels + (g * col_tiles + tile) * tokens * col_step; }
  Acc *b_panel(int64_t g, int64_t tile) const { return b_panels + (g * row_tiles + tile) * tokens * row_step; }
  Acc *table(int64_t cut, int64_t g) const { return tables + (cut * groups + g) * s.buckets * lanes<Acc>; }

  // Panels are [group][tile][token][column of the tile][lane].
  void pack(int64_t g, int64_t t) const {
    const In *a[lanes<Acc>], *b[lanes<Acc>];
    for (int l = 0; l < lanes<Acc>; ++l) {
      const int64_t piece = g * lanes<Acc> + l, i = piece / pieces, token = piece % pieces * tokens + t;
      const bool real = i < s.samples && token < s.tokens;
      a[l] = real ? static_cast<const In *>(s.a) + i * s.a_sample + token * s.a_token : nullptr;
      b[l] = real ? static_cast<const In *>(s.b) + i * s.b_sample + token * s.b_token : nullptr;
    }
    pack_side<cols>(a, s.d, a_panel(g, 0) + t * col_step);
    pack_side<rows>(b, s.p, b_panel(g, 0) + t * row_step);
  }

  template <int width> void pack_side(const In *const (&from)[lanes<Acc>], int64_t n, Acc *panels) const {
    const int64_t tile_step = tokens * width * lanes<Acc>, padded = ceil_div(n, width) * width;
    for (int64_t c = 0; c < padded; c += lanes<Acc>) {
      vec<Acc> v[lanes<Acc>];
#pragma GCC unroll 16
      for (int l = 0; l < lanes<Acc>; ++l)
        v[l] = from[l] ? load_part(from[l] + c, n - c) : vec<Acc>{};
      transpose<Acc>(v);
      for (int64_t q = c; q < least(padded, c + lanes<Acc>); ++q)
        store(panels + q / width * tile_step + q % width * lanes<Acc>, v[q - c]);
    }
  }

  static vec<Acc> load_part(const In *from, int64_t n) {
    if (n >= lanes<Acc>)
      return load_wide(from);
    Acc padded[lanes<Acc>];
    copy_padded(from, padded, most(0, n), lanes<Acc>);
    return load(padded);
  }

  // Some groups' sums over some blocks of G.
  void sketch(int64_t chunk, int64_t cut) const {
    static thread_local Workspace hash_space, tile_space;
    uint32_t *hashes = hash_space.get<uint32_t>(s.nonzeros * block_rows * span_cols);
    Acc *unfinished = tile_space.get<Acc>(block_rows * block_cols * lanes<Acc>);
    const int64_t first = chunk * groups_per_task, last = least(groups, first + groups_per_task);
    std::memset(table(cut, first), 0, sizeof(Acc) * (last - first) * s.buckets * lanes<Acc>);
    const int64_t units = row_blocks * spans, unit = cut * units_per_task;
    for (int64_t u = unit; u < least(units, unit + units_per_task); ++u) {
      const int64_t row = u / spans * block_rows, col = u % spans * span_cols;
      const int64_t width = least(span_cols, ceil_div(s.d - col, block_cols) * block_cols);
      for (int64_t j = 0; j < s.nonzeros; ++j)
        draw_hashes(row, col, width, j, hashes + j * block_rows * span_cols);
      for (int64_t g = first; g < last; ++g)
        for (int64_t c = 0; c < width; c += block_cols)
          sketch_block(g, row, col + c, hashes + c, unfinished, table(cut, g));
    }
  }

  // Buckets below the sign in bit 31, [row of the block][column of the span]; for the padding of tiles too.
  void draw_hashes(int64_t row, int64_t col, int64_t width, int64_t j, uint32_t *to) const {
    const uint32_t first = static_cast<uint32_t>(j * s.buckets / s.nonzeros);
    const uint32_t buckets = static_cast<uint32_t>((j + 1) * s.buckets / s.nonzeros) - first;
    for (int64_t r = 0; r < least(block_rows, row_tiles * rows - row); r += 4)
      for (int64_t c = 0; c < width; c += draw_cols) {
        const Words words(s, col + c, (row + r) / 4, 2 + j);
        for (int q = 0; q < 4; ++q)
          narrow((wide_product(words.word[q], buckets) >> 32) + first | words.word[q] << 31,
                 to + (r + q) * span_cols + c);
      }
  }

  static void narrow(vec<uint64_t> hashes, uint32_t *to) {
    typedef uint32_t half __attribute__((vector_size(vector_bytes / 2)));
    const half low = __builtin_convertvector(hashes, half);
    std::memcpy(to, &low, sizeof low);
  }

  // One group's sums over a block of tiles. Long samples go by blocks of tokens; between them the sums wait in
  // `unfinished`.
  void sketch_block(int64_t g, int64_t row, int64_t col, const uint32_t *hashes, Acc *unfinished, Acc *to) const {
    const int64_t row_end = least(block_row_tiles, row_tiles - row / rows);
    const int64_t col_end = least(block_col_tiles, col_tiles - col / cols);
    for (int64_t t = 0; t < tokens; t += block_tokens)
      for (int64_t k = 0; k < row_end; ++k)
        for (int64_t l = 0; l < col_end; ++l) {
          Acc *sums = unfinished + (k * block_col_tiles + l) * rows * cols * lanes<Acc>;
          vec<Acc> acc[rows][cols];
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < cols; ++c)
              acc[r][c] = t ? load(sums + (r * cols + c) * lanes<Acc>) : vec<Acc>{};
          add_products(a_panel(g, col / cols + l) + t * col_step, b_panel(g, row / rows + k) + t * row_step,
                       least(block_tokens, tokens - t), acc);
          if (t + block_tokens >= tokens)
            scatter(acc, hashes + k * rows * span_cols + l * cols, to);
          else
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
              for (int c = 0; c < cols; ++c)
                store(sums + (r * cols + c) * lanes<Acc>, acc[r][c]);
        }
  }

  static inline void add_products(const Acc *__restrict a, const Acc *__restrict b, int64_t n,
                                  vec<Acc> (&acc)[rows][cols]) {
    for (int64_t t = 0; t < n; ++t) {
      vec<Acc> x[cols];
#pragma GCC unroll 4
      for (int c = 0; c < cols; ++c)
        x[c] = load(a + t * col_step + c * lanes<Acc>);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const vec<Acc> y = load(b + t * row_step + r * lanes<Acc>);
#pragma GCC unroll 4
        for (int c = 0; c < cols; ++c)
          acc[r][c] += y * x[c];
      }
    }
  }

  // A finished tile into the buckets of its elements. Padding is zero wherever its hash sends it.
  inline void scatter(const vec<Acc> (&acc)[rows][cols], const uint32_t *hashes, Acc *to) const {
    typedef std::conditional_t<sizeof(Acc) == 8, uint64_t, uint32_t> Bits;
    for (int64_t j = 0; j < s.nonzeros; ++j, hashes += block_rows * span_cols)
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < cols; ++c) {
          const uint32_t hash = hashes[r * span_cols + c];
          const Bits sign = Bits(hash & 0x80000000u) << (8 * sizeof(Acc) - 32);
          Acc *bucket = to + int64_t(hash & 0x7fffffffu) * lanes<Acc>;
          store(bucket, load(bucket) + (vec<Acc>)((vec<Bits>)acc[r][c] ^ sign));
        }
  }

  void finish(int64_t h) const {
    const double scale = 1 / std::sqrt(double(s.nonzeros));
    double sum = 0;
    for (int64_t g = 0, piece = 0; g < groups; ++g) {
      vec<Acc> lane_sums = {};
      for (int64_t cut = 0; cut < cuts; ++cut)
        lane_sums += load(table(cut, g) + h * lanes<Acc>);
      for (int l = 0; l < lanes<Acc> && piece < s.samples * pieces; ++l, ++piece) {
        sum = (piece % pieces ? sum : 0) + double(lane_sums[l]);
        if (piece % pieces == pieces - 1)
          static_cast<Acc *>(s.out)[piece / pieces * s.buckets + h] = static_cast<Acc>(sum * scale);
      }
    }
  }

  const GradProject &s;
  int64_t pieces, groups, tokens; // of samples; vectors of them; tokens of a piece
  int64_t row_tiles, col_tiles, row_blocks, span_cols, spans, chunks, units_per_task, cuts;
  Acc *a_panels = nullptr, *b_panels = nullptr, *tables = nullptr;
};

} // namespace

void grad_project(const GradProject &args) {
  const bool sparse = args.kind == GradProject::Kind::sparse;
  if (args.samples * args.tokens * args.d * args.p == 0) {
    const int64_t size = args.samples * (sparse ? args.buckets : args.k_out * args.k_in);
    if (size) // an empty output may be null
      std::memset(args.out, 0, size * size_of(args.dtype == DType::f64 ? DType::f64 : DType::f32));
  } else if (sparse)
    run_kernel<Sparse>(args);
  else
    run_kernel<Kronecker>(args);
}

} // namespace gg::GG_ISA
