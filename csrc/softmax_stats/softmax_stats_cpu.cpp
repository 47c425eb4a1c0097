// softmax_stats on the CPU: a row goes by in blocks that stay in L1. Its largest logit so far is held out of the sums,
// so that nothing is ever subtracted from 1. What bounds it: reading the logits once in float32, e^x in half types. See
// docs/ops/softmax_stats.md.
#include "core/exp.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/workspace.h"
#include "softmax_stats/softmax_stats.h"
#include <cmath>
#include <limits>

namespace gg::GG_ISA {
namespace {

constexpr int64_t block_bytes = 4096;     // in the accumulator's type: a block with a new largest logit is read again
constexpr int64_t ahead_bytes = 1536;     // how far ahead of its use memory is asked for
constexpr int64_t wanted_tasks = 64;      // few rows are cut to get as many,
constexpr int64_t least_elements = 32768; // but into no smaller tasks than this

// How far above the reference a logit may lie that its weight is relative to: far enough for most new seconds not to
// need another one, while weights and their squares stay small beside the range of float.
constexpr int slack = 4;

template <class T> constexpr T infinity = std::numeric_limits<T>::infinity();

// e^(x - y) for x <= y. The difference is taken exactly: its rounding error would come out |x - y| times as large.
inline double exp_difference(double x, double y) {
  const double d = x - y, back = d - x;
  const double error = (x - (d - back)) - (y + back);
  return std::exp(d) * (1 + (error == error ? error : 0));
}

// Sums over elements z of weights w = e^(reference - z).
struct Sums {
  double sum = 0;     // of w
  double squares = 0; // of w^2
  double spread = 0;  // of (reference - z) w; NaN where any z is
};

// What a stretch of a row comes to: its largest logit, and sums over all the others relative to one of them, which is
// the second largest or at most `slack` less. So they contain a 1; or nothing, where reference is -inf.
struct Stretch {
  double first = -infinity<double>, reference = -infinity<double>;
  Sums rest;

  void add(const Sums &more) {
    rest.sum += more.sum;
    rest.squares += more.squares;
    rest.spread += more.spread;
  }

  // The smaller first joins the rest.
  void merge(const Stretch &other) {
    const Stretch parts[] = {*this, other};
    const double demoted = first < other.first ? first : other.first;
    first = most_of(first, other.first);
    reference = most_of(demoted, most_of(reference, other.reference));
    rest = {};
    for (const Stretch &part : parts) {
      const bool any = part.reference > -infinity<double>;
      const double scale = any ? exp_difference(part.reference, reference) : 0;
      const double below = any ? reference - part.reference : 0;
      add({scale * part.rest.sum, scale * scale * part.rest.squares,
           scale * (part.rest.spread + below * part.rest.sum)});
    }
    if (demoted > -infinity<double>) {
      const double w = exp_difference(demoted, reference);
      add({w, w * w, (reference - demoted) * w});
    }
  }

private:
  static double most_of(double x, double y) { return x < y ? y : x; }
};

// The last few elements, the rest of the vector filled with `fill`.
template <class In, class Acc> inline vec<Acc> load_some(const In *from, int64_t n, Acc fill) {
  vec<Acc> padded;
  for (int64_t l = 0; l < lanes<Acc>; ++l)
    padded[l] = l < n ? widen(from[l]) : fill;
  return padded;
}

// The next two vectors, in any order: bfloat16 widens in one instruction where even elements go to one and odd ones to
// the other.
template <class In, class V> inline void load_pair(const In *from, V &x, V &y) {
  x = load_wide(from), y = load_wide(from + sizeof x / sizeof x[0]);
}
inline void load_pair(const bf16 *from, vec<float> &x, vec<float> &y) {
  vec<uint32_t> both;
  std::memcpy(&both, from, sizeof both);
  x = (vec<float>)(both << 16), y = (vec<float>)(both & 0xffff0000u);
}

// Vector sums of weights; `clamped` where an element may lie above the reference, and counts as lying on it.
template <class Acc, bool clamped> struct VectorSums {
  using Bits = vec<typename ExpTable<Acc>::Bits>;
  vec<Acc> sum{}, squares{}, spread{};
  Bits signs{}; // a negative lane: something lay above the limit

  inline void add(vec<Acc> z, vec<Acc> reference, vec<Acc> limit) {
    vec<Acc> y = reference - z;
    if constexpr (clamped)
      y = larger(vec<Acc>{}, y);
    else
      signs |= (Bits)(limit - z);
    y = smaller(splat(ExpTable<Acc>::largest), y);
    const vec<Acc> w = exp_minus<Acc>(y);
    sum += w;
    squares += w * w;
    spread += y * w;
  }
};

// The sums of n elements; false, and nothing of use, if one lies above the limit and is not clamped.
template <bool clamped, class In, class Acc>
bool sum_block(const In *z, int64_t n, Acc reference_, Acc limit_, Sums &out) {
  constexpr int64_t together = 4, pair = 2 * lanes<Acc>;
  VectorSums<Acc, clamped> sums[2];
  const vec<Acc> reference = splat(reference_), limit = splat(limit_);
  int64_t c = 0;
  for (; c + together * lanes<Acc> <= n; c += together * lanes<Acc>)
#pragma GCC unroll 4
    for (int64_t at = c; at < c + together * lanes<Acc>; at += pair) {
      for (int64_t byte = 0; byte < pair * int64_t(sizeof(In)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char *>(z + at) + ahead_bytes + byte);
      vec<Acc> x, y;
      load_pair(z + at, x, y);
      sums[0].add(x, reference, limit);
      sums[1].add(y, reference, limit);
    }
  for (; c + lanes<Acc> <= n; c += lanes<Acc>)
    sums[0].add(load_wide(z + c), reference, limit);
  if (c < n)
    sums[1].add(load_some(z + c, n - c, -infinity<Acc>), reference, limit);
  if constexpr (!clamped) {
    const auto signs = sums[0].signs | sums[1].signs;
    typename ExpTable<Acc>::Bits any = 0;
    for (int l = 0; l < lanes<Acc>; ++l)
      any |= signs[l];
    if (any < 0)
      return false;
  }
  out = {double(sum_lanes<Acc>(sums[0].sum + sums[1].sum)), double(sum_lanes<Acc>(sums[0].squares + sums[1].squares)),
         double(sum_lanes<Acc>(sums[0].spread + sums[1].spread))};
  return true;
}

// The two largest of those seen in every lane; NaN is passed over.
template <class Acc> struct TopTwo {
  vec<Acc> first = splat(-infinity<Acc>), second = first;

  inline void take(vec<Acc> z) {
    second = larger(smaller(z, first), second);
    first = larger(z, first);
  }

  template <int half = lanes<Acc> / 2> inline void fold() {
    second = larger(second, rotated<Acc, half>(second));
    take(rotated<Acc, half>(first));
    if constexpr (half > 1)
      fold<half / 2>();
  }
};

// A block on its own.
template <class Acc, class In> Stretch own_stretch(const In *z, int64_t n) {
  TopTwo<Acc> top;
  int64_t c = 0;
  for (; c + lanes<Acc> <= n; c += lanes<Acc>)
    top.take(load_wide(z + c));
  if (c < n)
    top.take(load_some(z + c, n - c, -infinity<Acc>));
  top.fold();
  const Acc first = top.first[0], second = top.second[0];
  Stretch found{first, second, {}};
  if (second > -infinity<Acc>) {
    sum_block<true>(z, n, second, first, found.rest);
    found.rest.sum -= 1; // the first, which counted as a second
    found.rest.squares -= 1;
  } else
    for (c = 0; c < n; ++c)
      if (const Acc x = widen(z[c]); x != x)
        found.rest.spread = x;
  return found;
}

// Most blocks hold no new first: that shows when they are summed, and only the few others are summed again.
template <class Acc, class In> Stretch stretch(const In *z, int64_t n) {
  constexpr int64_t block = block_bytes / sizeof(Acc);
  Stretch total;
  for (int64_t c = 0; c < n; c += block) {
    const int64_t size = least(block, n - c);
    const Acc reference = Acc(total.reference), first = Acc(total.first);
    const Acc limit = first < reference + slack ? first : reference + slack;
    Sums sums;
    if (reference > -infinity<Acc> && sum_block<false>(z + c, size, reference, limit, sums))
      total.add(sums);
    else if (c > 0)
      total.merge(own_stretch<Acc>(z + c, size));
    else
      total = own_stretch<Acc>(z, size);
  }
  return total;
}

// What a finished row's stretch says of its probabilities.
struct Row {
  double first, reference;
  double scale;     // e^(reference - first)
  Sums rest;        // over all but the first
  double others;    // sum of e^(z - first) over all but the first
  double total;     // with the first: the largest probability is 1 / total
  double log_total; // logsumexp(z) - first
  bool defined;

  explicit Row(const Stretch &s) : first(s.first), reference(s.reference), rest(s.rest) {
    scale = alone() ? 0 : exp_difference(reference, first);
    others = scale * rest.sum;
    total = 1 + others;
    log_total = std::log1p(others);
    defined = first > -infinity<double> && first < infinity<double> && rest.spread == rest.spread;
  }

  bool alone() const { return reference == -infinity<double>; }
  double loss(double label) const { return (first - label) + log_total; }
  double entropy() const {
    return log_total + scale * (rest.spread + (alone() ? 0 : first - reference) * rest.sum) / total;
  }

  // ||p - onehot||: the label's own distance from 1 is the sum of the other probabilities. Where it is not the first,
  // the first is among those, and taking the label out of the sums costs a bit at most.
  double el2n(double label) const {
    if (label == first)
      return scale * std::sqrt(rest.squares + rest.sum * rest.sum) / total;
    const double w = exp_difference(label, first), except = 1 + (others - w);
    return std::sqrt(1 + (scale * scale * rest.squares - w * w) + except * except) / total;
  }
};

// A row, or a stretch of it, beside its distribution.
struct Residual {
  double loss = 0;    // sum of q (first - z)
  double mass = 0;    // sum of q
  double squares = 0; // sum of (p - q)^2

  void add(const Residual &more) { loss += more.loss, mass += more.mass, squares += more.squares; }
};

inline vec<double> squares_in_double(vec<double> x) { return x * x; }
inline vec<double> squares_in_double(vec<float> x) {
  const vec<double> low = as_doubles<0>(x), high = as_doubles<1>(x);
  return low * low + high * high;
}

// p - q is formed class by class: from sums it would be the small difference of large ones. That needs the row's total,
// and so a second read. The first's p is 1 - others / total, and is subtracted as such; its weight may be outside of
// what exp_minus takes, and is not used.
template <class Acc, class In, class Label>
Residual residual_block(const In *z, const Label *q, int64_t n, const Row &row) {
  vec<Acc> loss{}, mass{};
  vec<double> squares{};
  const vec<Acc> first = splat(Acc(row.first)), reference = splat(Acc(row.alone() ? row.first : row.reference));
  const Acc p_reference = Acc(row.scale / row.total), missing = Acc(row.others / row.total);
  const auto add = [&](vec<Acc> zc, vec<Acc> qc) {
    const vec<Acc> y = smaller(splat(ExpTable<Acc>::largest), reference - zc);
    const vec<Acc> difference = zc == first ? (1 - qc) - missing : exp_minus<Acc>(y) * p_reference - qc;
    loss += qc != 0 ? qc * (first - zc) : vec<Acc>{};
    mass += qc;
    squares += squares_in_double(difference);
  };
  int64_t c = 0;
  for (; c + lanes<Acc> <= n; c += lanes<Acc>)
    add(load_wide(z + c), load_wide(q + c));
  if (c < n)
    add(load_some(z + c, n - c, -infinity<Acc>), load_some(q + c, n - c, Acc(0)));
  return {double(sum_lanes<Acc>(loss)), double(sum_lanes<Acc>(mass)), sum_lanes<double>(squares)};
}

template <class In, class Acc> class Kernel {
public:
  explicit Kernel(const SoftmaxStats &args) : s(args) {
    rows = s.samples * s.tokens;
    rows_per_task = most(1, least_elements / most(1, s.classes));
    cuts = most(1, least(ceil_div(wanted_tasks, most(1, rows)), s.classes / least_elements));
    classes_per_cut = ceil_div(ceil_div(s.classes, cuts), block) * block;
    distributions = s.label_dtype < DType::i32;
  }

  void run() {
    *s.bad_row = -1;
    cuts > 1 ? run_cut() : parallel_for(ceil_div(rows, rows_per_task), [this](int64_t task) {
      const int64_t last = least(rows, (task + 1) * rows_per_task);
      for (int64_t row = task * rows_per_task; row < last; ++row)
        if (wants(row)) {
          const Row found(stretch<Acc>(logits(row), s.classes));
          write(row, found, distributions ? residual(row, 0, s.classes, found) : Residual{});
        }
    });
  }

private:
  static constexpr int64_t block = block_bytes / sizeof(Acc);

  const In *logits(int64_t row) const {
    return static_cast<const In *>(s.logits) + row / s.tokens * s.logit_sample + row % s.tokens * s.logit_token;
  }

  int64_t class_number(int64_t row) const { return s.class_number(row / s.tokens, row % s.tokens); }

  // Few long rows: their cuts are tasks of their own, merged in order.
  void run_cut() {
    static thread_local Workspace stretch_space, residual_space;
    Stretch *stretches = stretch_space.get<Stretch>(rows * cuts);
    Residual *residuals = residual_space.get<Residual>(rows * cuts);
    const auto each_cut = [&](auto &&work) {
      parallel_for(rows * cuts, [&](int64_t task) {
        const int64_t first = least(s.classes, task % cuts * classes_per_cut);
        work(task, task / cuts, first, least(s.classes, first + classes_per_cut));
      });
    };
    const auto merged = [&](int64_t row) {
      Stretch whole;
      for (int64_t cut = 0; cut < cuts; ++cut)
        whole.merge(stretches[row * cuts + cut]);
      return Row(whole);
    };
    each_cut([&](int64_t task, int64_t row, int64_t first, int64_t last) {
      if (wants(row))
        stretches[task] = stretch<Acc>(logits(row) + first, last - first);
    });
    if (distributions)
      each_cut([&](int64_t task, int64_t row, int64_t first, int64_t last) {
        residuals[task] = residual(row, first, last, merged(row));
      });
    for (int64_t row = 0; row < rows; ++row)
      if (wants(row)) {
        Residual whole;
        for (int64_t cut = 0; distributions && cut < cuts; ++cut)
          whole.add(residuals[row * cuts + cut]);
        write(row, merged(row), whole);
      }
  }

  Residual residual(int64_t row, int64_t first, int64_t last, const Row &found) const {
    const int64_t at = row / s.tokens * s.label_sample + row % s.tokens * s.label_token;
    Residual total;
    for (int64_t c = first; c < last; c += block) {
      const int64_t size = least(block, last - c);
      total.add(s.label_dtype == s.dtype
                    ? residual_block<Acc>(logits(row) + c, static_cast<const In *>(s.labels) + at + c, size, found)
                    : residual_block<Acc>(logits(row) + c, static_cast<const Acc *>(s.labels) + at + c, size, found));
    }
    return total;
  }

  // Whether a row is to be read; what is to be said of one that is not, is said here.
  bool wants(int64_t row) const {
    if (distributions)
      return true;
    const int64_t label = class_number(row);
    if (label == s.ignore_index)
      write(row, 0, 0, 0, 0);
    else if (label >= 0 && label < s.classes)
      return true;
    else
      report(row);
    return false;
  }

  void report(int64_t row) const {
    int64_t known = __atomic_load_n(s.bad_row, __ATOMIC_RELAXED);
    while ((known < 0 || row < known) &&
           !__atomic_compare_exchange_n(s.bad_row, &known, row, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      ;
  }

  void write(int64_t row, const Row &found, const Residual &residual) const {
    if (!found.defined) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      write(row, nan, nan, nan, nan);
    } else if (distributions) {
      write(row, residual.loss + found.log_total * residual.mass, std::sqrt(residual.squares), found.entropy(),
            1 / found.total);
    } else {
      const double label = widen(logits(row)[class_number(row)]);
      write(row, found.loss(label), found.el2n(label), found.entropy(), 1 / found.total);
    }
  }

  void write(int64_t row, double loss, double el2n, double entropy, double max_probability) const {
    const auto put = [row](void *to, double value) {
      if (to)
        static_cast<Acc *>(to)[row] = Acc(value);
    };
    put(s.loss, loss), put(s.el2n, el2n), put(s.entropy, entropy), put(s.max_probability, max_probability);
  }

  const SoftmaxStats &s;
  int64_t rows, rows_per_task, cuts, classes_per_cut;
  bool distributions;
};

} // namespace

void softmax_stats(const SoftmaxStats &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
