// grad_gram on the CPU: tiles of 4 x 4 tokens with the lanes along the features, so that tokens are read as they lie
// and a tile's scores end as one vector. What bounds it: the FMA units. See docs/ops/grad_gram.md.
#include "core/parallel.h"
#include "core/simd.h"
#include "core/workspace.h"
#include "grad_gram/grad_gram.h"

namespace gg::GG_ISA {
namespace {

// Tokens of a tile on either side; 16 sums fill half of 32 registers, where there are 16 the tile is done by halves.
constexpr int tile = 4;
constexpr int half_cols = vector_registers == 32 ? 4 : 2;
constexpr int half_scores = tile * half_cols;
constexpr int tile_scores = tile * tile;

// What a panel holds: features, widened to the accumulator's type.
template <class In, class Acc> struct Panel {
  using Element = Acc;
  template <class From> static vec<Acc> load(const From *from) { return load_wide(from); }
  static void multiply_add(vec<Acc> &acc, vec<Acc> x, vec<Acc> y) { acc += x * y; }
};

#if defined(__AVX512BF16__)
// Features as they lie: the processor multiplies pairs of bfloat16 and adds both products to a float.
template <> struct Panel<bf16, float> {
  using Element = uint16_t;
  template <class From> static vec<uint16_t> load(const From *from) {
    return GG_ISA::load(reinterpret_cast<const uint16_t *>(from));
  }
  static void multiply_add(vec<float> &acc, vec<uint16_t> x, vec<uint16_t> y) {
    acc = (vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)y);
  }
};
#endif

// The left tile's block of features stays in L1 while the right tiles stream past it.
constexpr int64_t block_bytes = 16 << 10;
constexpr int64_t block_steps = block_bytes / (tile * vector_bytes);

// The right tokens of a task stay in L2; fewer than that where it takes more tasks to feed a pool.
constexpr int64_t right_bytes = 1 << 20;
constexpr int64_t wanted_cuts = 16;
constexpr int64_t least_tokens = 32;

// scores[col / half_cols][row][col % half_cols] += x_row . y_col over `steps` vectors of features; both panels are
// [step][token][lane].
template <class In, class Acc, class Element = typename Panel<In, Acc>::Element>
inline void add_scores(const Element *__restrict x, const Element *__restrict y, int64_t steps, Acc *scores) {
  constexpr int64_t step = tile * lanes<Element>;
  for (int half = 0; half < tile / half_cols; ++half) {
    vec<Acc> acc[half_scores] = {};
    const Element *from = y + half * half_cols * lanes<Element>;
    for (int64_t s = 0; s < steps; ++s) {
      vec<Element> col[half_cols];
#pragma GCC unroll 4
      for (int c = 0; c < half_cols; ++c)
        col[c] = load(from + s * step + c * lanes<Element>);
#pragma GCC unroll 4
      for (int r = 0; r < tile; ++r) {
        const vec<Element> row = load(x + s * step + r * lanes<Element>);
#pragma GCC unroll 4
        for (int c = 0; c < half_cols; ++c)
          Panel<In, Acc>::multiply_add(acc[r * half_cols + c], row, col[c]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < half_scores; v += lanes<Acc>) {
      Acc *to = scores + half * half_scores + v;
      store(to, load(to) + sum_lanes_of_each<Acc>(acc + v));
    }
  }
}

// One token's features into its place among `high` tokens of a panel, [step][token][lane]; zeros beyond n.
template <int high, class In, class Acc, class Element = typename Panel<In, Acc>::Element>
inline void pack_token(const In *from, int64_t n, int64_t steps, Element *to) {
  constexpr int64_t width = lanes<Element>;
  int64_t s = 0;
  for (; (s + 1) * width <= n; ++s)
    store(to + s * high * width, Panel<In, Acc>::load(from + s * width));
  if (s * width < n) {
    In rest[width] = {};
    std::memcpy(rest, from + s * width, (n - s * width) * sizeof(In));
    store(to + s++ * high * width, Panel<In, Acc>::load(rest));
  }
  for (; s < steps; ++s)
    store(to + s * high * width, vec<Element>{});
}

// Norms of short samples take tiles as high as it needs to cut a sample evenly, so that one token is not padded to
// four. A sample of one tile is read as it lies. Others go by panels of features that stay in L1 beside the sums of all
// pairs.
constexpr int64_t short_tokens = 16;
constexpr int64_t panel_bytes = 16 << 10;
constexpr int highest = vector_registers == 32 ? 4 : 3;
constexpr int64_t most_tiles = ceil_div(short_tokens, highest);
constexpr int64_t most_pairs = most_tiles * (most_tiles + 1) / 2;

// Vectors of sums of a pair of tiles, in whole groups that are folded together.
template <int high, class Acc> constexpr int64_t pair_sums = ceil_div(high * high, lanes<Acc>) * lanes<Acc>;

// sums[row * high + col] += x_row * y_col, lane by lane; with itself a tile needs no col below its row.
template <int high, bool itself, class In, class Acc, class From>
inline void add_products(const From *x, const From *y, int64_t row_stride, int64_t step_stride, int64_t steps,
                         vec<Acc> *sums) {
  using Element = typename Panel<In, Acc>::Element;
  vec<Acc> acc[high * high];
#pragma GCC unroll 16
  for (int q = 0; q < high * high; ++q)
    acc[q] = sums[q];
  for (int64_t s = 0; s < steps; ++s, x += step_stride, y += step_stride) {
    vec<Element> col[high];
#pragma GCC unroll 4
    for (int c = 0; c < high; ++c)
      col[c] = Panel<In, Acc>::load(y + c * row_stride);
#pragma GCC unroll 4
    for (int r = 0; r < high; ++r) {
      const vec<Element> row = itself ? col[r] : Panel<In, Acc>::load(x + r * row_stride);
#pragma GCC unroll 4
      for (int c = itself ? r : 0; c < high; ++c)
        Panel<In, Acc>::multiply_add(acc[r * high + c], row, col[c]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < high * high; ++q)
    sums[q] = acc[q];
}

// Scores of all pairs k <= l of a short sample's tiles.
template <int high, class In, class Acc>
void short_scores(const In *from, int64_t token_stride, int64_t tokens, int64_t n, Acc *scores) {
  const int64_t tiles = ceil_div(tokens, high), pairs = tiles * (tiles + 1) / 2;
  using Element = typename Panel<In, Acc>::Element;
  constexpr int64_t width = lanes<Element>, step = high * width;
  alignas(64) Element panel[panel_bytes / sizeof(Element)];
  vec<Acc> sums[most_pairs * pair_sums<highest, Acc>];
  std::memset(sums, 0, pairs * pair_sums<high, Acc> * vector_bytes);
  int64_t first = 0;
  if (tiles == 1 && tokens == high) {
    first = n / width * width; // the panel is for what is no whole vector
    add_products<high, true, In, Acc>(from, from, token_stride, width, n / width, sums);
  }
  const int64_t panel_features = panel_bytes / (most(1, tiles) * high * vector_bytes) * width;
  for (; first < n; first += panel_features) {
    const int64_t features = least(n - first, panel_features), steps = ceil_div(features, width);
    for (int64_t t = 0; t < tiles * high; ++t)
      pack_token<high, In, Acc>(from + first + least(t, tokens - 1) * token_stride, t < tokens ? features : 0, steps,
                                panel + t / high * steps * step + t % high * width);
    vec<Acc> *to = sums;
    for (int64_t k = 0; k < tiles; ++k)
      for (int64_t l = k; l < tiles; ++l, to += pair_sums<high, Acc>) {
        const Element *x = panel + k * steps * step, *y = panel + l * steps * step;
        if (k == l)
          add_products<high, true, In, Acc>(x, y, width, step, steps, to);
        else
          add_products<high, false, In, Acc>(x, y, width, step, steps, to);
      }
  }
  for (int64_t v = 0; v < pairs * pair_sums<high, Acc>; v += lanes<Acc>)
    store(scores + v, sum_lanes_of_each<Acc>(sums + v));
}

// ||G_i||^2 of one short sample; tokens that only fill the last tile have scores of 0.
template <int high, class In, class Acc> double short_norm2(const GradGram &args, int64_t i) {
  const GradGram::Side &side = args.left;
  Acc a_scores[most_pairs * pair_sums<highest, Acc>], b_scores[most_pairs * pair_sums<highest, Acc>];
  short_scores<high>(static_cast<const In *>(side.a) + i * side.a_sample, side.a_token, side.tokens, args.d, a_scores);
  short_scores<high>(static_cast<const In *>(side.b) + i * side.b_sample, side.b_token, side.tokens, args.p, b_scores);
  double sum = 0;
  const Acc *x = a_scores, *y = b_scores;
  for (int64_t k = 0; k < side.tokens; k += high)
    for (int64_t l = k; l < side.tokens; l += high, x += pair_sums<high, Acc>, y += pair_sums<high, Acc>)
      for (int r = 0; r < high; ++r)
        for (int c = k == l ? r : 0; c < high; ++c)
          sum += (k == l && r == c ? 1 : 2) * double(x[r * high + c]) * double(y[r * high + c]);
  return sum;
}

// The tokens of one side, in groups of whole samples. Within a group tokens are numbered through, so that short samples
// share tiles, and only the last tile is padded with zeros. A group too long for L2 is read in several pieces.
template <class In, class Acc> struct Side {
  using Element = typename Panel<In, Acc>::Element;
  const GradGram::Side &s;
  int64_t d, p, samples_per_group, groups, tiles, pieces, tiles_per_piece, a_steps, b_steps;

  Side(const GradGram &args, const GradGram::Side &side) : s(side), d(args.d), p(args.p) {
    a_steps = ceil_div(d, lanes<Element>);
    b_steps = ceil_div(p, lanes<Element>);
    const int64_t token_bytes = most(1, (a_steps + b_steps) * vector_bytes);
    const int64_t tokens =
        least(most(least_tokens, s.samples * s.tokens / wanted_cuts), most(tile, right_bytes / token_bytes));
    samples_per_group = args.diagonal ? 1 : most(1, least(s.samples, tokens / most(1, s.tokens)));
    groups = ceil_div(s.samples, samples_per_group);
    tiles = ceil_div(samples_per_group * s.tokens, tile);
    pieces = most(1, ceil_div(tiles, tokens / tile));
    tiles_per_piece = ceil_div(tiles, pieces);
  }

  int64_t a_tile() const { return a_steps * tile * lanes<Element>; }
  int64_t b_tile() const { return b_steps * tile * lanes<Element>; }
  int64_t group_size() const { return tiles * (a_tile() + b_tile()); }
  int64_t first_sample(int64_t group) const { return group * samples_per_group; }
  int64_t samples_in(int64_t group) const { return least(samples_per_group, s.samples - first_sample(group)); }
  int64_t tokens_in(int64_t group) const { return samples_in(group) * s.tokens; }

  // A packed group is [tile of a] and then [tile of b], each [step][token][lane].
  void pack(int64_t group, int64_t k, Element *panels) const {
    for (int r = 0; r < tile; ++r) {
      const int64_t token = k * tile + r;
      const bool real = token < tokens_in(group);
      const int64_t i = real ? first_sample(group) + token / s.tokens : 0, t = real ? token % s.tokens : 0;
      pack_token<tile, In, Acc>(static_cast<const In *>(s.a) + i * s.a_sample + t * s.a_token, real ? d : 0, a_steps,
                                panels + k * a_tile() + r * lanes<Element>);
      pack_token<tile, In, Acc>(static_cast<const In *>(s.b) + i * s.b_sample + t * s.b_token, real ? p : 0, b_steps,
                                panels + tiles * a_tile() + k * b_tile() + r * lanes<Element>);
    }
  }
};

template <class In, class Acc> class Kernel {
  using Element = typename Panel<In, Acc>::Element;

public:
  explicit Kernel(const GradGram &args) : s(args), left(args, args.left), right(args, args.right) {}

  void run() {
    if (s.diagonal && s.left.tokens <= short_tokens)
      return short_norms();
    static thread_local Workspace partial_space;
    if (right.pieces > 1)
      partials = partial_space.get<double>(right.pieces * pairs());
    if (s.diagonal && right.pieces == 1)
      parallel_for(left.groups, [this](int64_t i) { // packed where it is used: the panels never leave L2
        static thread_local Workspace panel_space;
        Element *panels = panel_space.get<Element>(left.group_size());
        for (int64_t k = 0; k < left.tiles; ++k)
          left.pack(i, k, panels);
        group_pair(i, i, 0, panels, panels);
      });
    else
      all_groups();
    if (right.pieces > 1)
      for (int64_t pair = 0; pair < pairs(); ++pair) {
        const int64_t i = s.diagonal ? pair : pair / s.right.samples, j = s.diagonal ? pair : pair % s.right.samples;
        double sum = 0;
        for (int64_t piece = 0; piece < right.pieces; ++piece)
          sum += partials[piece * pairs() + pair];
        if (!s.symmetric || i <= j)
          write(i, j, sum);
      }
  }

private:
  int64_t pairs() const { return s.left.samples * (s.diagonal ? 1 : s.right.samples); }

  void short_norms() {
    const int64_t tiles = most(1, ceil_div(s.left.tokens, highest)), high = ceil_div(s.left.tokens, tiles);
    parallel_for(s.left.samples, [=, this](int64_t i) {
      const double norm2 = high <= 1   ? short_norm2<1, In, Acc>(s, i)
                           : high == 2 ? short_norm2<2, In, Acc>(s, i)
                           : high == 3 ? short_norm2<3, In, Acc>(s, i)
                                       : short_norm2<highest, In, Acc>(s, i);
      write(i, i, norm2);
    });
  }

  void all_groups() {
    static thread_local Workspace panel_space;
    const int64_t left_tiles = left.groups * left.tiles, right_tiles = s.symmetric ? 0 : right.groups * right.tiles;
    Element *left_panels =
        panel_space.get<Element>(left.groups * left.group_size() + right.groups * right.group_size());
    Element *right_panels = s.symmetric ? left_panels : left_panels + left.groups * left.group_size();
    parallel_for(left_tiles + right_tiles, [=, this](int64_t k) {
      const bool second = k >= left_tiles;
      const Side<In, Acc> &side = second ? right : left;
      const int64_t at = second ? k - left_tiles : k, group = at / side.tiles;
      side.pack(group, at % side.tiles, (second ? right_panels : left_panels) + group * side.group_size());
    });
    // Neighbouring tasks share the right tokens, which stay in L2.
    const int64_t lefts = s.diagonal ? 1 : left.groups;
    parallel_for(right.groups * right.pieces * lefts, [=, this](int64_t task) {
      const int64_t j = task / lefts / right.pieces, i = s.diagonal ? j : task % lefts;
      if (!s.symmetric || i <= j)
        group_pair(i, j, task / lefts % right.pieces, left_panels + i * left.group_size(),
                   right_panels + j * right.group_size());
    });
  }

  // All pairs of a left group's tokens and those of one piece of a right group.
  void group_pair(int64_t gi, int64_t gj, int64_t piece, const Element *x, const Element *y) const {
    static thread_local Workspace score_space, sum_space;
    const int64_t first = piece * right.tiles_per_piece, last = least(right.tiles, first + right.tiles_per_piece);
    Acc *a_scores = score_space.get<Acc>(2 * right.tiles_per_piece * tile_scores);
    Acc *b_scores = a_scores + right.tiles_per_piece * tile_scores;
    const int64_t rows = left.samples_in(gi), cols = right.samples_in(gj);
    double *sums = sum_space.get<double>(rows * cols);
    for (int64_t q = 0; q < rows * cols; ++q)
      sums[q] = 0;

    const bool same = s.symmetric && gi == gj;
    for (int64_t k = 0; k < left.tiles; ++k) {
      const int64_t from = same ? most(first, k) : first;
      if (from >= last)
        break;
      scores(x + k * left.a_tile(), y, left.a_steps, from, last, a_scores);
      scores(x + left.tiles * left.a_tile() + k * left.b_tile(), y + right.tiles * right.a_tile(), left.b_steps, from,
             last, b_scores);
      for (int64_t l = from; l < last; ++l)
        collect(k, l, left.tokens_in(gi), right.tokens_in(gj), same, a_scores + (l - from) * tile_scores,
                b_scores + (l - from) * tile_scores, sums, cols);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = same ? i : 0; j < cols; ++j)
        finish(left.first_sample(gi) + i, right.first_sample(gj) + j, piece, sums[i * cols + j]);
  }

  // The scores of one left tile with the right tiles [from, last).
  static void scores(const Element *x, const Element *y, int64_t steps, int64_t from, int64_t last, Acc *to) {
    std::memset(to, 0, sizeof(Acc) * (last - from) * tile_scores);
    for (int64_t s = 0; s < steps; s += block_steps)
      for (int64_t l = from; l < last; ++l)
        add_scores<In, Acc>(x + s * tile * lanes<Element>, y + (l * steps + s) * tile * lanes<Element>,
                            least(block_steps, steps - s), to + (l - from) * tile_scores);
  }

  // Adds the products of a tile's scores to the sums of the samples its tokens belong to. In a group paired with itself
  // only tiles k <= l come: those off the diagonal count twice within a sample; on it, half is for the mirror.
  void collect(int64_t k, int64_t l, int64_t rows, int64_t cols, bool same, const Acc *a, const Acc *b, double *sums,
               int64_t stride) const {
    const int64_t row = k * tile, col = l * tile;
    const int64_t row_end = least(rows, row + tile), col_end = least(cols, col + tile);
    const double twice = same && k < l ? 2 : 1;
    const int64_t i = row / s.left.tokens, j = col / s.right.tokens;
    if (i == (row_end - 1) / s.left.tokens && j == (col_end - 1) / s.right.tokens) {
      vec<Acc> products = {};
      for (int v = 0; v < tile_scores; v += lanes<Acc>)
        products += load(a + v) * load(b + v);
      sums[i * stride + j] += (same && i == j ? twice : 1) * double(sum_lanes<Acc>(products));
      return;
    }
    for (int64_t r = row; r < row_end; ++r)
      for (int64_t c = col; c < col_end; ++c) {
        const int64_t at = ((c - col) / half_cols * tile + r - row) * half_cols + (c - col) % half_cols;
        const int64_t ri = r / s.left.tokens, cj = c / s.right.tokens;
        sums[ri * stride + cj] += (same && ri == cj ? twice : 1) * double(a[at] * b[at]);
      }
  }

  void finish(int64_t i, int64_t j, int64_t piece, double sum) const {
    if (right.pieces == 1)
      write(i, j, sum);
    else
      partials[piece * pairs() + (s.diagonal ? i : i * s.right.samples + j)] = sum;
  }

  void write(int64_t i, int64_t j, double sum) const {
    Acc *out = static_cast<Acc *>(s.out);
    out[s.diagonal ? i : i * s.out_row + j] = static_cast<Acc>(sum);
    if (s.symmetric && !s.diagonal)
      out[j * s.out_row + i] = static_cast<Acc>(sum);
  }

  const GradGram &s;
  const Side<In, Acc> left, right;
  double *partials = nullptr;
};

} // namespace

void grad_gram(const GradGram &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
