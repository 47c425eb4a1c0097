// A walk over the per-sample weight gradients of a linear layer, G_i = sum_t b_it a_it^T, tile by tile and sample by
// sample: each tile is finished in registers, handed to the room and forgotten. a and b are packed into panels first,
// so that ragged sizes have no slow path, and the plan keeps panels in the caches that they are used from. What bounds
// it: the FMA units. docs/ops/grad_stats.md says what each number here has bought.
#pragma once
#include "core/parallel.h"
#include "core/simd.h"
#include "core/workspace.h"

namespace gg::GG_ISA {

// A tile of G is tile_rows x tile_cols: 14 x 2 vectors fill 28 of AVX-512's 32 registers, 6 x 2 fill 12 of 16.
constexpr int tile_rows = vector_registers == 32 ? 14 : 6;
constexpr int tile_vectors = 2;
template <class Acc> constexpr int tile_cols = tile_vectors * lanes<Acc>;
template <class Acc> using Tile = vec<Acc>[tile_rows][tile_vectors];

// What a panel holds, one element per column and step: a token's value, widened to the accumulator's type.
template <class In, class Acc> struct Panel {
  using Element = Acc;
  static constexpr int64_t step_tokens = 1;
  static vec<Acc> load(const In *from, int64_t, int64_t) { return load_wide(from); }
  static Acc element(const In *from, int64_t, int64_t) { return widen(*from); }
  static void multiply_add(vec<Acc> &acc, Acc y, vec<Acc> x) { acc += splat(y) * x; }
};

#if defined(__AVX512BF16__)
// Two tokens at a time, side by side: the processor multiplies pairs of bfloat16 and adds both products to a float.
template <> struct Panel<bf16, float> {
  using Element = uint32_t;
  static constexpr int64_t step_tokens = 2;
  static vec<uint32_t> load(const bf16 *from, int64_t token, int64_t tokens) {
    const vec<uint32_t> first = load_bits(from);
    return tokens > 1 ? first | load_bits(from + token) << 16 : first;
  }
  static uint32_t element(const bf16 *from, int64_t token, int64_t tokens) {
    return from->bits | (tokens > 1 ? uint32_t(from[token].bits) << 16 : 0);
  }
  static void multiply_add(vec<float> &acc, uint32_t y, vec<uint32_t> x) {
    acc = (vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)splat(y), (__m512bh)x);
  }
};
#endif

// A block of steps of both panels takes 24 KiB of an L1 that has 32 or 48.
template <class Element>
constexpr int64_t block_steps = (24 << 10) / (int64_t(sizeof(Element)) * (tile_rows + tile_cols<Element>));

// A task owns up to `group_tiles` row tiles: its panels of b stay in L2 while all of a streams past them.
constexpr int group_tiles = 4;
constexpr int64_t b_panel_bytes = 1 << 20;
// Panels are made for some of the work at a time: of the narrower operand for as many samples as fit here, of the wider
// one for a wave of row groups or of cuts of the columns, as many as fit there. What the room loads for a block is
// visited once per tile and lot of samples; what is packed stays in the last-level cache until it is used.
constexpr int64_t lot_bytes = 16 << 20, wave_bytes = 32 << 20;
// When a wave has too few row groups to feed a pool, the columns are cut.
constexpr int64_t wanted_tasks = 16;
constexpr int64_t pack_steps = 16;

// acc += sum_t b_t a_t^T; `a` is a [steps][tile_cols] panel, `b` a [steps][tile_rows] one. Meanwhile the panel of b
// that comes next is fetched into L1, and, where `fetch_a`, the panel of a.
template <class In, class Acc, bool fetch_a, class Element = typename Panel<In, Acc>::Element>
static inline void tile_product(const Element *__restrict a, const Element *__restrict b, const Element *next_a,
                                const Element *next_b, int64_t steps, Tile<Acc> &acc) {
  for (int64_t t = 0; t < steps; ++t) {
    vec<Element> x[tile_vectors];
    __builtin_prefetch(next_b + t * tile_rows);
    if constexpr (fetch_a)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v)
        __builtin_prefetch(next_a + t * tile_cols<Acc> + v * lanes<Acc>);
#pragma GCC unroll 4
    for (int v = 0; v < tile_vectors; ++v)
      x[v] = load(a + t * tile_cols<Acc> + v * lanes<Acc>);
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < tile_vectors; ++v)
        Panel<In, Acc>::multiply_add(acc[r][v], b[t * tile_rows + r], x[v]);
  }
}

// What a room reads beside a and b, and writes, goes some column tiles at a time: rows lie pages apart, and each visit
// costs a page walk. A task's block has a row group's rows; in scratch it is [column tile][row][column of the tile].
constexpr int block_tiles = 2;
template <class Acc> struct Block {
  int64_t row, rows, col, cols;
  static constexpr int64_t at(int64_t r) { return r * tile_cols<Acc>; }
  static constexpr int64_t tile_size = at(group_tiles * tile_rows), size = block_tiles * tile_size;
};

// Room is the class that derives from this, and has
//   open_block(block, continued, scratch)   loads what it needs of a block; `continued`: samples came before
//   finish_tile(acc, tile, rows, cols, i, sums)   uses sample i's finished tile and adds to the sample's `sums`; `tile`
//                                                 is its place in scratch, rows and cols are how much of it exists
//   close_block(block, scratch)             writes what the samples have left
// Args has samples, tokens, d, p and the places and strides of a and b.
template <class Room, class Args, class In, class Acc> class GradientTiles {
  using Element = typename Panel<In, Acc>::Element;
  static constexpr int64_t step_tokens = Panel<In, Acc>::step_tokens;

public:
  // So many blocks of scratch, and so many sums of every sample.
  GradientTiles(const Args &args, int64_t blocks, int64_t sums)
      : s(args), blocks(blocks), sums(sums), steps(ceil_div(s.tokens, step_tokens)) {
    steps_per_block = most(1, ceil_div(steps, most(1, ceil_div(steps, block_steps<Element>))));
    rows_per_group = group_tiles * tile_rows;
    while (rows_per_group > tile_rows && bytes_of(rows_per_group) > b_panel_bytes)
      rows_per_group -= tile_rows;
    samples_per_pass = most(1, b_panel_bytes / bytes_of(rows_per_group));
    row_groups = ceil_div(s.p, rows_per_group);
    col_tiles = ceil_div(s.d, tile_cols<Acc>);

    samples_per_lot = most(1, least(s.samples, lot_bytes / bytes_of(least(s.d, s.p))));
    const int64_t wave_cols = most(1, wave_bytes / (samples_per_lot * bytes_of(1))); // or rows
    const bool by_rows = s.p >= s.d;
    groups_per_wave = by_rows ? share(row_groups, wave_cols / rows_per_group) : row_groups;
    const int64_t tiles_per_wave = by_rows ? col_tiles : share(col_tiles, wave_cols / tile_cols<Acc>);
    tiles_per_cut = share(tiles_per_wave, tiles_per_wave / ceil_div(wanted_tasks, most(1, groups_per_wave)));
    col_cuts = ceil_div(col_tiles, tiles_per_cut);
    cuts_per_wave = ceil_div(tiles_per_wave, tiles_per_cut);
  }

  void walk() {
    static thread_local Workspace panel_space, partial_space;
    const int64_t a_elements = samples_per_lot * steps * cuts_per_wave * tiles_per_cut * tile_cols<Acc>;
    a_panels = panel_space.get<Element>(a_elements + samples_per_lot * steps * groups_per_wave * rows_per_group);
    b_panels = a_panels + a_elements;
    partials = partial_space.get<vec<double>>(row_groups * col_cuts * s.samples * sums);
    for (int64_t sample = 0; sample == 0 || sample < s.samples; sample += samples_per_lot)
      for (int64_t group = 0; group < row_groups; group += groups_per_wave)
        for (int64_t cut = 0; cut < col_cuts; cut += cuts_per_wave)
          wave({sample, least(samples_per_lot, s.samples - sample), group, least(groups_per_wave, row_groups - group),
                cut, least(cuts_per_wave, col_cuts - cut)});
  }

protected:
  // Sum q of a sample over all tiles, once the walk is done: task by task, and lane by lane at the very end.
  double sum(int64_t i, int64_t q) const {
    vec<double> all = {};
    for (int64_t task = 0; task < row_groups * col_cuts; ++task)
      all += partial(task, i)[q];
    return sum_lanes<double>(all);
  }

  // Lanes are added up at the very end: a tile's own sum over lanes would wait for itself log2(lanes) times.
  static void add_tile_row(vec<double> &sum, const vec<Acc> (&x)[tile_vectors]) {
    vec<Acc> row = x[0];
    for (int v = 1; v < tile_vectors; ++v)
      row += x[v];
    add_wide(sum, row);
  }

  // A block of a (p, d) matrix, widened, with zeros in the rows and columns that its tiles lack.
  template <class From> void load_block(const Block<Acc> &block, const From *from, int64_t row_stride, Acc *to) const {
    from += block.row * row_stride + block.col;
    for (int64_t r = 0; r < block.rows; ++r)
      for_each_tile(block, [&](int64_t col, int64_t cols, int64_t place) {
        copy_row<tile_cols<Acc>>(from + r * row_stride + col, to + place + block.at(r), cols);
      });
    const int64_t missing = ceil_div(block.rows, tile_rows) * tile_rows - block.rows;
    for_each_tile(block, [&](int64_t, int64_t, int64_t place) {
      std::memset(to + place + block.at(block.rows), 0, sizeof(Acc) * block.at(missing));
    });
    constexpr int64_t block_cols = block_tiles * tile_cols<Acc>;
    if (block.col + block_cols < s.d)
      fetch_block(from + block_cols, row_stride, block.rows);
  }
  // visit(first column in the block, columns that exist, place in scratch) for every column tile.
  template <class Visit> static void for_each_tile(const Block<Acc> &block, Visit &&visit) {
    for (int64_t col = 0, place = 0; col < block.cols; col += tile_cols<Acc>, place += block.tile_size)
      visit(col, least(tile_cols<Acc>, block.cols - col), place);
  }

  // Of the dtype of a and b, or else of the sums.
  void load_block(const Block<Acc> &block, const void *from, int64_t row_stride, DType dtype, Acc *to) const {
    if (dtype == s.dtype)
      load_block(block, static_cast<const In *>(from), row_stride, to);
    else
      load_block(block, static_cast<const Acc *>(from), row_stride, to);
  }

  const Args &s;

private:
  // What is packed at a time, and then multiplied.
  struct Wave {
    int64_t sample, samples, group, groups, cut, cuts;
  };

  // How many of n things to take at a time: at most `limit`, at least one, nearly the same number each time.
  static int64_t share(int64_t n, int64_t limit) { return most(1, ceil_div(n, most(1, ceil_div(n, most(1, limit))))); }

  // Of some columns of one sample's a or b, packed. Positive, so that it can divide.
  int64_t bytes_of(int64_t columns) const { return most(1, steps * columns * int64_t(sizeof(Element))); }

  void wave(const Wave &w) const {
    const int64_t packs = ceil_div(steps, pack_steps);
    const bool new_a = cuts_per_wave < col_cuts || w.group == 0, new_b = groups_per_wave < row_groups || w.cut == 0;
    parallel_for(2 * w.samples * packs, [&](int64_t task) {
      const int64_t i = task / 2 / packs, first = task / 2 % packs * pack_steps;
      const int64_t last = least(steps, first + pack_steps);
      if (task % 2 ? new_b : new_a)
        task % 2 ? pack_b(w, i, first, last) : pack_a(w, i, first, last);
    });
    parallel_for(w.groups * w.cuts,
                 [&](int64_t task) { tile_group(w, w.group + task / w.cuts, w.cut + task % w.cuts); });
  }

  vec<double> *partial(int64_t task, int64_t i) const { return partials + (task * s.samples + i) * sums; }
  // The panel of a wave's sample, and of its column or row tile.
  Element *a_panel(int64_t i, int64_t tile) const {
    return a_panels + (i * cuts_per_wave * tiles_per_cut + tile) * steps * tile_cols<Acc>;
  }
  Element *b_panel(int64_t i, int64_t tile) const {
    return b_panels + (i * groups_per_wave * (rows_per_group / tile_rows) + tile) * steps * tile_rows;
  }

  // Panels are [sample][tile][step][column of the tile]. A pack takes a few steps across all tiles: step by step it
  // would touch every panel's page each time, tile by tile every token's.
  void pack_a(const Wave &w, int64_t i, int64_t first, int64_t last) const {
    const int64_t first_tile = w.cut * tiles_per_cut, tiles = least(w.cuts * tiles_per_cut, col_tiles - first_tile);
    for (int64_t j = 0; j < tiles; ++j) {
      const int64_t col = (first_tile + j) * tile_cols<Acc>, cols = least(tile_cols<Acc>, s.d - col);
      const In *from = static_cast<const In *>(s.a) + (w.sample + i) * s.a_sample + col;
      for (int64_t t = first; t < last; ++t)
        pack_step<tile_cols<Acc>, tile_cols<Acc>>(from, s.a_token, t, a_panel(i, j) + t * tile_cols<Acc>, cols);
    }
  }

  // Whole vectors are packed while the row has them: what they spill past a panel's row is overwritten by the next
  // step, so the last one is packed to measure.
  void pack_b(const Wave &w, int64_t i, int64_t first, int64_t last) const {
    constexpr int whole = ceil_div(tile_rows, lanes<Acc>) * lanes<Acc>;
    const int64_t first_row = w.group * rows_per_group, rows = least(w.groups * rows_per_group, s.p - first_row);
    for (int64_t k = 0; k * tile_rows < rows; ++k) {
      const int64_t row = first_row + k * tile_rows;
      const In *from = static_cast<const In *>(s.b) + (w.sample + i) * s.b_sample + row;
      int64_t t = first;
      if (row + whole <= s.p)
        for (; t + 1 < last; ++t)
          pack_step<whole, whole>(from, s.b_token, t, b_panel(i, k) + t * tile_rows, whole);
      for (; t < last; ++t)
        pack_step<whole, tile_rows>(from, s.b_token, t, b_panel(i, k) + t * tile_rows, least(tile_rows, s.p - row));
    }
  }

  // One step of `n` columns, then zeros up to `padded`. All `width` at once, as it nearly always is, costs a few
  // cycles.
  template <int width, int padded>
  void pack_step(const In *from, int64_t token, int64_t t, Element *to, int64_t n) const {
    const int64_t left = s.tokens - t * step_tokens;
    from += t * step_tokens * token;
    int64_t c = 0;
    if (n == width)
#pragma GCC unroll 8
      for (; c < width; c += lanes<Acc>)
        store(to + c, Panel<In, Acc>::load(from + c, token, left));
    for (; c + lanes<Acc> <= n; c += lanes<Acc>)
      store(to + c, Panel<In, Acc>::load(from + c, token, left));
    for (; c < n; ++c)
      to[c] = Panel<In, Acc>::element(from + c, token, left);
    for (; c < padded; ++c)
      to[c] = 0;
  }

  // Asks for a block's rows before they are needed: pages apart, they are found by no hardware prefetcher.
  template <class T> static void fetch_block(const T *from, int64_t row_stride, int64_t rows) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < block_tiles * tile_cols<Acc>; c += line)
        __builtin_prefetch(from + r * row_stride + c, 0, 2);
  }

  void tile_group(const Wave &w, int64_t group, int64_t cut) const {
    static thread_local Workspace tile_space;
    const int64_t task = group * col_cuts + cut;
    const int64_t row = group * rows_per_group, rows = least(rows_per_group, s.p - row);
    const int64_t row_tile = (group - w.group) * (rows_per_group / tile_rows), col_tile = w.cut * tiles_per_cut;
    const int64_t first_col = cut * tiles_per_cut, last_col = least(col_tiles, first_col + tiles_per_cut);
    Acc *unfinished = tile_space.get<Acc>((1 + blocks) * Block<Acc>::size), *scratch = unfinished + Block<Acc>::size;
    for (int64_t q = 0; q < w.samples * sums; ++q)
      partial(task, w.sample)[q] = vec<double>{};

    for (int64_t pass = 0; pass == 0 || pass < w.samples; pass += samples_per_pass) {
      const int64_t last = least(w.samples, pass + samples_per_pass);
      for (int64_t first_tile = first_col; first_tile < last_col; first_tile += block_tiles) {
        const int64_t tiles = least(block_tiles, last_col - first_tile), col = first_tile * tile_cols<Acc>;
        const Block<Acc> block{row, rows, col, least(tiles * tile_cols<Acc>, s.d - col)};
        room().open_block(block, w.sample + pass > 0, scratch);
        for (int64_t j = 0; j < tiles; ++j)
          for (int64_t i = pass; i < last; ++i) {
            const int64_t next = i + 1 < last ? i + 1 : pass, next_j = i + 1 < last ? j : j + 1;
            const int64_t at = first_tile - col_tile;
            sample_tile(a_panel(i, at + j), b_panel(i, row_tile), a_panel(next, at + next_j), b_panel(next, row_tile),
                        rows, block.cols - j * tile_cols<Acc>, unfinished, scratch + j * Block<Acc>::tile_size,
                        w.sample + i, partial(task, w.sample + i));
          }
        room().close_block(block, scratch);
      }
    }
  }

  // One sample's tiles in one row group and one column tile. Long samples go by blocks of steps, so that the block of
  // `a` stays in L1 for all row tiles; between blocks the sums wait in `unfinished`. `next_a` and `next_b` are the
  // panels of the next sample.
  void sample_tile(const Element *a, const Element *b, const Element *next_a, const Element *next_b, int64_t rows,
                   int64_t cols, Acc *unfinished, Acc *scratch, int64_t sample, vec<double> *sums) const {
    const int64_t tiles = ceil_div(rows, tile_rows);
    for (int64_t t = 0; t < steps || t == 0; t += steps_per_block) {
      const int64_t count = least(steps_per_block, steps - t);
      const bool finished = t + count >= steps;
      for (int64_t k = 0; k < tiles; ++k) {
        const int64_t at = Block<Acc>::at(k * tile_rows);
        const Element *block = a + t * tile_cols<Acc>, *b_block = b + (k * steps + t) * tile_rows;
        Tile<Acc> acc;
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < tile_vectors; ++v)
            acc[r][v] = t ? load(unfinished + at + Block<Acc>::at(r) + v * lanes<Acc>) : vec<Acc>{};
        if (k + 1 < tiles)
          tile_product<In, Acc, false>(block, b_block, block, b_block + steps * tile_rows, count, acc);
        else
          tile_product<In, Acc, true>(block, b_block, finished ? next_a : block + count * tile_cols<Acc>,
                                      finished ? next_b : b + (t + count) * tile_rows, count, acc);
        if (finished)
          room().finish_tile(acc, scratch + at, rows - k * tile_rows, cols, sample, sums);
        else
#pragma GCC unroll 16
          for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < tile_vectors; ++v)
              store(unfinished + at + Block<Acc>::at(r) + v * lanes<Acc>, acc[r][v]);
      }
    }
  }

  const Room &room() const { return static_cast<const Room &>(*this); }

  int64_t blocks, sums;
  int64_t steps; // of step_tokens each
  int64_t steps_per_block, rows_per_group, samples_per_pass, row_groups, col_tiles;
  int64_t samples_per_lot, groups_per_wave, tiles_per_cut, cuts_per_wave, col_cuts;
  Element *a_panels = nullptr, *b_panels = nullptr;
  vec<double> *partials = nullptr;
};

} // namespace gg::GG_ISA
