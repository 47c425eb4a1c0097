// affine_stats on the CPU: both per-sample sums grow in L1 while b and x stream past, four tokens at a time. What
// bounds it: reading b and x once. See docs/ops/affine_stats.md.
#include "affine_stats/affine_stats.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/workspace.h"

namespace gg::GG_ISA {
namespace {

// Tokens added together: the sums are loaded and stored once for all of them. The next ones are asked for meanwhile:
// rows are too short for the hardware to get far ahead in them.
constexpr int together = 4;

// Samples are grouped, or a sample's tokens cut, into about this many tasks.
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

template <class In, class Acc> class Kernel {
public:
  explicit Kernel(const AffineStats &args) : s(args) {
    samples_per_group = ceil_div(s.samples, wanted_tasks);
    groups = samples_per_group ? ceil_div(s.samples, samples_per_group) : 0;
    cuts = samples_per_group == 1 ? most(1, least(ceil_div(wanted_tasks, groups), s.tokens / least_tokens)) : 1;
    tokens_per_cut = ceil_div(s.tokens, cuts);
  }

  void run() {
    static thread_local Workspace total_space;
    totals = total_space.get<Acc>(most(1, groups * cuts) * 2 * s.features);
    parallel_for(groups * cuts,
                 [this](int64_t task) { cuts > 1 ? sample_cut(task / cuts, task % cuts) : group(task); });
    if (cuts > 1)
      parallel_for(groups, [this](int64_t i) {
        for (int64_t cut = 1; cut < cuts; ++cut)
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
  // A group's sum of samples, or with cuts a part of its only one: W's features, then V's.
  Acc *total(int64_t group, int64_t cut) const { return totals + (group * cuts + cut) * 2 * s.features; }

  void group(int64_t g) const {
    static thread_local Workspace row_space;
    Acc *rows = row_space.get<Acc>(2 * s.features);
    std::memset(total(g, 0), 0, sizeof(Acc) * 2 * s.features);
    const int64_t last = least(s.samples, (g + 1) * samples_per_group);
    for (int64_t i = g * samples_per_group; i < last; ++i) {
      sum_tokens(i, 0, s.tokens, rows);
      finish_sample(i, rows);
      add_row(rows, 2 * s.features, total(g, 0));
    }
  }

  void sample_cut(int64_t i, int64_t cut) const {
    const int64_t first = cut * tokens_per_cut;
    sum_tokens(i, first, least(s.tokens, first + tokens_per_cut), total(i, cut));
  }

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
      b[k] = static_cast<const In *>(s.b) + i * s.b_sample + (t + k) * s.b_token;
      x[k] = with_x ? static_cast<const In *>(s.x) + i * s.x_sample + (t + k) * s.x_token : nullptr;
      mean[k] = s.mean ? static_cast<const Acc *>(s.mean)[i * s.mean_sample + (t + k) * s.mean_token] : 0;
      rstd[k] = s.rstd ? static_cast<const Acc *>(s.rstd)[i * s.rstd_sample + (t + k) * s.rstd_token] : 1;
    }
    Acc *W = rows, *V = rows + s.features;
    int64_t c = 0;
    for (; c + lanes<Acc> <= s.features; c += lanes<Acc>) {
      vec<Acc> w = load(W + c), v = load(V + c);
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) {
        const vec<Acc> y = load_wide(b[k] + c);
        __builtin_prefetch(b[k] + c + together * s.b_token);
        v += y;
        if constexpr (with_x) {
          w += y * ((load_wide(x[k] + c) - mean[k]) * rstd[k]);
          __builtin_prefetch(x[k] + c + together * s.x_token);
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
  int64_t samples_per_group, groups, cuts, tokens_per_cut;
  Acc *totals = nullptr;
};

} // namespace

void affine_stats(const AffineStats &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
