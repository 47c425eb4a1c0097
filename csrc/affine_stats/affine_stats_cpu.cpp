// affine_stats on the CPU: both per-sample sums grow in L1 while b and x stream past, four tokens at a time; channels
// first, they grow in registers, channel by channel. What bounds it: reading b and x once. See
// docs/ops/affine_stats.md.
#include "affine_stats/affine_stats.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/workspace.h"

namespace gg::GG_ISA {
namespace {

// Tokens added together: the sums are loaded and stored once for all of them. The next ones are asked for meanwhile:
// rows are too short for the hardware to get far ahead in them.
constexpr int together = 4;

// Channels first: independent sums along space, which hide the latency of an addition.
constexpr int chains = 4;

// Samples are grouped, or a sample's tokens or channels cut, into about this many tasks.
constexpr int64_t wanted_tasks = 64;
constexpr int64_t least_tokens = 64;
constexpr int64_t cols_per_task = 1024;

template <class Acc> inline double dot_rows(const Acc *x, const Acc *y, int64_t n) {
  vec<Acc> sum[2] = {};
  int64_t c = 0;
  for (; c + 2 * lanes<Acc> <= n; c += 2 * lanes<Acc>) {
    sum[0] += load(x + c) * load(y + c);
    sum[1] += load(x + c + lanes<Acc>) * load(y + c + lanes<Acc>);
  }
  Acc rest = 0;
  for (; c < n; ++c)
    rest += x[c] * y[c];
  return double(sum_lanes<Acc>(sum[0] + sum[1])) + double(rest);
}

template <class Acc> inline void add_row(const Acc *from, int64_t n, Acc *to) {
  int64_t c = 0;
  for (; c + lanes<Acc> <= n; c += lanes<Acc>)
    store(to + c, load(to + c) + load(from + c));
  for (; c < n; ++c)
    to[c] += from[c];
}

// The sums of x's and of y's lanes, in lanes 0 and lanes/2: hardly more shuffles than for one of them.
template <class Acc> inline vec<Acc> sum_lanes_of_both(vec<Acc> x, vec<Acc> y) {
  constexpr int half = lanes<Acc> / 2;
  vec<Acc> both = fold_pair<half>(x, y, typename count_lanes<lanes<Acc>>::type{});
  if constexpr (half >= 8)
    both += rotated<Acc, 4>(both);
  if constexpr (half >= 4)
    both += rotated<Acc, 2>(both);
  if constexpr (half >= 2)
    both += rotated<Acc, 1>(both);
  return both;
}

template <class In, class Acc> class Kernel {
public:
  explicit Kernel(const AffineStats &args) : s(args) {
    samples_per_group = ceil_div(s.samples, wanted_tasks);
    groups = samples_per_group ? ceil_div(s.samples, samples_per_group) : 0;
    const int64_t most_cuts = s.channels_first ? s.features : s.tokens / least_tokens;
    cuts = samples_per_group == 1 ? most(1, least(ceil_div(wanted_tasks, groups), most_cuts)) : 1;
    totals_per_group = s.channels_first ? 1 : cuts;
  }

  void run() {
    static thread_local Workspace total_space;
    totals = total_space.get<Acc>(most(1, groups * totals_per_group) * 2 * s.features);
    parallel_for(groups * cuts,
                 [this](int64_t task) { cuts > 1 ? sample_cut(task / cuts, task % cuts) : group(task); });
    if (cuts > 1)
      parallel_for(groups, [this](int64_t i) {
        for (int64_t cut = 1; cut < totals_per_group; ++cut)
          add_row(total(i, cut), 2 * s.features, total(i, 0));
        finish_sample(i, total(i, 0));
      });
    parallel_for(ceil_div(s.features, cols_per_task), [this](int64_t task) {
      const int64_t first = task * cols_per_task, last = least(s.features, first + cols_per_task);
      finish_grad(s.weight, 0, first, last);
      finish_grad(s.bias, s.features, first, last);
    });
  }

private:
  // A group's sum of samples, or a cut of its only one's tokens (cuts of channels fill one): W's features, then V's.
  Acc *total(int64_t group, int64_t cut) const { return totals + (group * totals_per_group + cut) * 2 * s.features; }

  void group(int64_t g) const {
    static thread_local Workspace row_space;
    Acc *rows = row_space.get<Acc>(2 * s.features);
    std::memset(total(g, 0), 0, sizeof(Acc) * 2 * s.features);
    const int64_t last = least(s.samples, (g + 1) * samples_per_group);
    for (int64_t i = g * samples_per_group; i < last; ++i) {
      s.channels_first ? sum_channels(i, 0, s.features, rows) : sum_tokens(i, 0, s.tokens, rows);
      finish_sample(i, rows);
      add_row(rows, 2 * s.features, total(g, 0));
    }
  }

  void sample_cut(int64_t i, int64_t cut) const {
    const int64_t all = s.channels_first ? s.features : s.tokens, size = ceil_div(all, cuts);
    const int64_t first = least(all, cut * size), last = least(all, first + size);
    s.channels_first ? sum_channels(i, first, last, total(i, 0)) : sum_tokens(i, first, last, total(i, cut));
  }

  // Tokens: lanes run along the features, which are neighbours in memory. -------------------------------------------

  void sum_tokens(int64_t i, int64_t first, int64_t last, Acc *rows) const {
    std::memset(rows, 0, sizeof(Acc) * 2 * s.features);
    int64_t t = first;
    for (; t + together <= last; t += together)
      s.x ? add_tokens<true, together>(i, t, rows) : add_tokens<false, together>(i, t, rows);
    for (; t < last; ++t)
      s.x ? add_tokens<true, 1>(i, t, rows) : add_tokens<false, 1>(i, t, rows);
  }

  // rows += the contributions of n tokens from t on.
  template <bool with_x, int n> void add_tokens(int64_t i, int64_t t, Acc *rows) const {
    const In *b[n], *x[n];
    Acc mean[n], rstd[n];
    for (int k = 0; k < n; ++k) {
      b[k] = static_cast<const In *>(s.b) + i * s.b_sample + (t + k) * s.b_row;
      x[k] = with_x ? static_cast<const In *>(s.x) + i * s.x_sample + (t + k) * s.x_row : nullptr;
      mean[k] = mean_at(i, t + k), rstd[k] = rstd_at(i, t + k);
    }
    Acc *W = rows, *V = rows + s.features;
    int64_t c = 0;
    for (; c + lanes<Acc> <= s.features; c += lanes<Acc>) {
      vec<Acc> w = load(W + c), v = load(V + c);
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) {
        const vec<Acc> y = load_wide(b[k] + c);
        __builtin_prefetch(b[k] + c + together * s.b_row);
        v += y;
        if constexpr (with_x) {
          w += y * ((load_wide(x[k] + c) - mean[k]) * rstd[k]);
          __builtin_prefetch(x[k] + c + together * s.x_row);
        }
      }
      store(V + c, v);
      if constexpr (with_x)
        store(W + c, w);
    }
    for (; c < s.features; ++c)
      for (int k = 0; k < n; ++k) {
        const Acc y = widen(b[k][c]);
        V[c] += y;
        if constexpr (with_x)
          W[c] += y * ((widen(x[k][c]) - mean[k]) * rstd[k]);
      }
  }

  // Channels first: lanes run along space, and each channel's row becomes one number. -------------------------------

  // Writes features first to last of both rows.
  void sum_channels(int64_t i, int64_t first, int64_t last, Acc *rows) const {
    for (int64_t f = first; f < last; ++f)
      s.x ? sum_channel<true>(i, f, rows) : sum_channel<false>(i, f, rows);
  }

  // mean is subtracted first, for the digits; rstd, the same for the whole row, multiplies its sum.
  template <bool with_x> void sum_channel(int64_t i, int64_t f, Acc *rows) const {
    const int64_t group = f / s.features_per_group;
    const In *b = static_cast<const In *>(s.b) + i * s.b_sample + f * s.b_row;
    const In *x = with_x ? static_cast<const In *>(s.x) + i * s.x_sample + f * s.x_row : nullptr;
    const Acc mean = with_x ? mean_at(i, group) : 0;
    vec<Acc> w[chains] = {}, v[chains] = {};
    const auto add = [&](int chain, int64_t t) {
      const vec<Acc> y = load_wide(b + t);
      v[chain] += y;
      if constexpr (with_x)
        w[chain] += y * (load_wide(x + t) - mean);
    };
    int64_t t = 0;
    for (; t + chains * lanes<Acc> <= s.tokens; t += chains * lanes<Acc>)
#pragma GCC unroll 4
      for (int k = 0; k < chains; ++k)
        add(k, t + k * lanes<Acc>);
    for (; t + lanes<Acc> <= s.tokens; t += lanes<Acc>)
      add(0, t);
    Acc w_rest = 0, v_rest = 0;
    for (; t < s.tokens; ++t) {
      const Acc y = widen(b[t]);
      v_rest += y;
      if constexpr (with_x)
        w_rest += y * (widen(x[t]) - mean);
    }
    const vec<Acc> both = sum_lanes_of_both<Acc>((w[0] + w[1]) + (w[2] + w[3]), (v[0] + v[1]) + (v[2] + v[3]));
    rows[f] = with_x && s.tokens ? (both[0] + w_rest) * rstd_at(i, group) : 0; // that of an empty space may be NaN
    rows[s.features + f] = both[lanes<Acc> / 2] + v_rest;
  }

  // Both: what is asked of the rows. --------------------------------------------------------------------------------

  Acc mean_at(int64_t i, int64_t k) const {
    return s.mean ? static_cast<const Acc *>(s.mean)[i * s.mean_sample + k * s.mean_step] : 0;
  }
  Acc rstd_at(int64_t i, int64_t k) const {
    return s.rstd ? static_cast<const Acc *>(s.rstd)[i * s.rstd_sample + k * s.rstd_step] : 1;
  }

  void finish_sample(int64_t i, const Acc *rows) const {
    finish_part(s.weight, i, rows);
    finish_part(s.bias, i, rows + s.features);
  }

  void finish_part(const AffineStats::Part &part, int64_t i, const Acc *row) const {
    if (part.norms2)
      static_cast<Acc *>(part.norms2)[i] = static_cast<Acc>(dot_rows(row, row, s.features));
    for (int64_t k = 0; k < part.directions; ++k)
      static_cast<Acc *>(part.dots)[i * part.directions + k] =
          static_cast<Acc>(dot_rows(row, static_cast<const Acc *>(part.D) + k * part.D_direction, s.features));
  }

  void finish_grad(const AffineStats::Part &part, int64_t offset, int64_t first, int64_t last) const {
    if (!part.grad)
      return;
    for (int64_t c = first; c < last; ++c) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g)
        sum += total(g, 0)[offset + c];
      static_cast<Acc *>(part.grad)[c] = static_cast<Acc>(sum);
    }
  }

  const AffineStats &s;
  int64_t samples_per_group, groups, cuts, totals_per_group;
  Acc *totals = nullptr;
};

} // namespace

void affine_stats(const AffineStats &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
